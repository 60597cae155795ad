// The best ids of a row, found while its logits are approximate, and their exact logits put there.
//
// The definition is vllm_diffusion/head/rescoring.py, `Rescoring`.
#pragma once

#include "row_pass.h"

extern "C" {

enum { VD_RESCORED = 64 };

struct vd_rescoring {
    float *values;         // [rows, width] logits; those of the best ids are replaced
    int64_t rows;
    int64_t width;         // at most VD_TILE
    int64_t stride;        // elements from row to row
    const float *ranked;   // [rows, width], what says which ids are best; may be the values
    int64_t ranked_stride;
    float *best;           // [rows, count], the best of what was ranked so far, in no order
    int64_t count;         // at most VD_RESCORED
    const void *hidden;    // [rows, inputs]
    int64_t hidden_stride;
    const void *output;    // [width, inputs], the tile's part of the matrix
    int64_t output_stride;
    int64_t inputs;
    int32_t dtype;         // of hidden and output: VD_FP32 or VD_BF16
    float softcap;         // of the exact logits; 0: none
};

// `threads` rows at a time, with an instruction set up to `vd_best_isa()`.
// Returns 0, or 1 where the arguments make no sense; nothing is changed then.
VD_EXPORT int32_t vd_rescore(const struct vd_rescoring *tile, int32_t threads, int32_t isa);
}
