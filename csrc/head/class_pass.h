// One tile of the vocabulary for rows of a streaming head, by class of tokens.
//
// The definition is vllm_diffusion/head/classes.py, `absorb`. The ids of a tile come in an order of
// their own, made once for a set of classes: chunks of sixteen lanes, a class a lane, longer ones
// first and lanes of about equal length together; or, wide chunks, all lanes one class, where it has
// many ids. Whatever the classes are, vectors run down the lanes, and what is running is touched
// once a chunk.
#pragma once

#include "row_pass.h"

extern "C" {

enum { VD_CHUNK = 16, VD_SLOTS = 8192 };

// What is known of a row and a class so far: side by side, for all of it is read together.
struct vd_running_class {
    float best;      // largest logit
    float second;    // the next one
    float mass;      // sum of w = exp(s), s = (logit - best) / T
    float moment;    // sum of w * s
    float score;     // best score of the race
    int32_t argmax;  // id of the largest logit
    int32_t sample;  // who leads the race
    int32_t unused;
};

struct vd_class_tile {
    const void *values;        // [rows, width] logits
    int64_t rows;
    int64_t width;             // at most VD_TILE
    int64_t stride;            // elements from row to row
    int64_t first;             // id of the first column
    int32_t dtype;             // of the values: VD_FP32 or VD_BF16
    float softcap;             // 0: none
    const float *temperature;  // [rows]
    const int64_t *key0;       // [rows] two words: the key of the row's race
    const int64_t *key1;
    int64_t classes;
    int64_t chunks;
    int64_t wide;              // so many chunks at the front are of one class each
    const int32_t *begin;      // [chunks + 1] slots, counted from any origin
    const uint16_t *place;     // from begin[0] on: columns, step by step; VD_TILE fills up
    const int32_t *lane;       // [chunks, VD_CHUNK] classes; 0 where a lane is empty
};

// Take the tile into `running`, [rows, classes], column 0 a bin: `threads` rows at a time, with an instruction set up to `vd_best_isa()`.
// Returns 0, or 1 where the arguments make no sense; nothing is changed then.
VD_EXPORT int32_t vd_absorb_classes(const struct vd_class_tile *tile,
                                    struct vd_running_class *running, int32_t threads,
                                    int32_t isa);
}
