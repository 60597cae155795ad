// A canvas given that a token automaton accepts it: framework-free, C calling convention.
//
// The definition is vllm_diffusion/constrain/automaton/posterior.py, `condition`.
#pragma once

#include <cstdint>

extern "C" {

// N states, the last one the end, C classes. Edges that share source and target are one pair, and
// the classes they read one set: few sets serve many pairs, so a row sums each of them once.
struct vd_automaton {
    int32_t states;
    int32_t classes;
    int32_t sets;
    const int32_t *edge_first;   // [N + 1], edges by source
    const int32_t *edge_class;   // [E], ascending inside a source
    const int32_t *edge_target;  // [E]
    const int32_t *pair_first;   // [N + 1], pairs by source
    const int32_t *pair_set;     // [P]
    const int32_t *pair_target;  // [P]
    const int32_t *set_first;    // [S + 1]
    const int32_t *set_class;    // members of every set
    const int32_t *distance;     // [N], fewest tokens to an accepting state
};

// B canvases of L rows, all arrays contiguous; what they mean: see `condition` and `Posterior`.
struct vd_canvases {
    int64_t canvases;
    int64_t length;
    const float *log_mass;       // [B, L, C]
    const float *best_log_prob;  // [B, L, C]
    const float *free;           // [B, L]
    const int64_t *start;        // [B]
    const int64_t *rows;         // [B]
    const int64_t *left;         // [B]
    const float *uniforms;       // [B, L]
    float *marginal;             // [B, L, C] out, as all below
    float *ended;                // [B, L]
    int64_t *sample_class;       // [B, L]
    int64_t *map_class;          // [B, L]
    int64_t *map_state;          // [B, L]
    double *log_z;               // [B]
};

#define VD_EXPORT __attribute__((visibility("default")))

// Condition the canvases, `threads` of them at a time.
// Returns 0, or 1 where the arguments make no sense; nothing is changed then.
VD_EXPORT int32_t vd_condition(const struct vd_automaton *automaton,
                               const struct vd_canvases *canvases, int32_t threads);
}
