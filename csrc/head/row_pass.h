// One tile of the vocabulary for rows of a streaming head: framework-free, C calling convention.
//
// The definition is vllm_diffusion/head/tile.py, `absorb`. Everything a row needs of a tile happens
// while the tile's logits of that row are in the cache, or in the registers of a GPU: largest and
// second logit, softcap, weights exp((logit - top) / T), their sums, and the draw.
#pragma once

#include <cstdint>

extern "C" {

// What is known of every row so far; arrays of `rows` entries.
struct vd_running {
    float *top;       // largest logit
    float *second;    // the next one
    float *mass;      // sum of w = exp(s), s = (logit - top) / T
    float *moment;    // sum of w * s
    float *score;     // best Gumbel score of a tile
    int64_t *argmax;  // id of the largest logit
    int64_t *sample;  // the draw inside the best tile
};

struct vd_tile {
    void *values;        // [rows, width] logits in, weights out
    int64_t rows;
    int64_t width;       // at most VD_TILE
    int64_t stride;      // elements from row to row
    int64_t first;       // id of the first column
    int32_t dtype;       // of the values: VD_FP32, VD_BF16, VD_FP16
    float softcap;       // 0: none
    const float *temperature;  // [rows]
    const float *gumbel;       // [rows], uniform in (0, 1): chooses the tile
    const float *inside;       // [rows], uniform in (0, 1): chooses the id in it
    int64_t uniform_stride;    // elements from row to row of both
    float *shrink;             // [rows] out: what the sums over earlier tiles shrink by
};

#define VD_EXPORT __attribute__((visibility("default")))

enum { VD_TILE = 4096, VD_BIN = 64 };
enum { VD_FP32 = 0, VD_BF16 = 1, VD_FP16 = 2 };

// For CPUs, row_pass.cpp: fp32 and bf16.
//
// Instruction sets: 0 what every processor of the architecture has, 1 AVX2 and FMA, 2 AVX-512.
// The best one that this processor has.
VD_EXPORT int32_t vd_best_isa(void);

// Take the tile in, `threads` rows at a time, with an instruction set up to `vd_best_isa()`.
// Returns 0, or 1 where the arguments make no sense; nothing is changed then.
VD_EXPORT int32_t vd_absorb(const struct vd_tile *tile, const struct vd_running *running,
                            int32_t threads, int32_t isa);

// For GPUs, row_pass.cu: every pointer is one of the current device, `stream` a cudaStream_t of it.
// Returns once the work is in the stream: 0, or -1 where the arguments make no sense and nothing is
// changed, or a cudaError_t.
VD_EXPORT int32_t vd_absorb_cuda(const struct vd_tile *tile, const struct vd_running *running,
                                 void *stream);
}
