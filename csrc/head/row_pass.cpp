// The row pass for every instruction set, chosen at run time, rows shared among threads.

#include "row_pass.h"

#include <cmath>
#include <cstring>

namespace {

// A finite stand-in for -inf, as in vllm_diffusion/head/tile.py.
constexpr float masked = -3e30f;

// First place in the tile whose running sum exceeds a share of the mass, never one that adds
// nothing: the bin first, then inside it. See vllm_diffusion/head/sample.py, `invert`.
int64_t first_above(const float *mass, int64_t count, double target, double *before) {
    double running = 0.0;
    int64_t last = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (mass[i] > 0.0f) {
            last = i;
            *before = running;
            if (running + mass[i] > target) break;
        }
        running += mass[i];
    }
    return last;
}

int64_t invert(const float *weights, const float *mass_of, int64_t bins, int64_t width,
               float uniform) {
    double total = 0.0, before = 0.0;
    for (int64_t bin = 0; bin < bins; ++bin) total += mass_of[bin];
    const double target = uniform * total;
    const int64_t bin = first_above(mass_of, bins, target, &before);
    const int64_t begin = bin * VD_BIN, end = begin + VD_BIN < width ? begin + VD_BIN : width;
    double ignored = 0.0;
    return begin + first_above(weights + begin, end - begin, target - before, &ignored);
}

}  // namespace

#define VD_PASS "row_pass.inc"
#include "each_isa.inc"

extern "C" int32_t vd_best_isa(void) {
#ifdef VD_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

extern "C" int32_t vd_absorb(const vd_tile *tile, const vd_running *running, int32_t threads,
                             int32_t isa) {
    if (tile->width < 1 || tile->width > VD_TILE || isa < 0 || isa > vd_best_isa()) return 1;
    if (tile->dtype != VD_FP32 && tile->dtype != VD_BF16) return 1;
    void (*absorb)(const vd_tile &, const vd_running &, int64_t) = plain::absorb_any;
#ifdef VD_X86
    if (isa == 1) absorb = avx2::absorb_any;
    if (isa == 2) absorb = avx512::absorb_any;
#endif
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < tile->rows; ++row) absorb(*tile, *running, row);
    return 0;
}
