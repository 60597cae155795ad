// The class pass for every instruction set, chosen at run time, rows shared among threads.

#include "class_pass.h"

#include <cmath>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// A finite stand-in for -inf, as in vllm_diffusion/head/tile.py.
constexpr float masked = -3e30f;

// Chunks ahead whose classes are fetched into the cache.
constexpr int64_t ahead = 2;

}  // namespace

#define VD_PASS "class_pass.inc"
#include "each_isa.inc"

extern "C" int32_t vd_absorb_classes(const vd_class_tile *tile, vd_running_class *running,
                                     int32_t threads, int32_t isa) {
    if (tile->width < 1 || tile->width > VD_TILE || isa < 0 || isa > vd_best_isa()) return 1;
    if (tile->dtype != VD_FP32 && tile->dtype != VD_BF16) return 1;
    if (tile->begin[tile->chunks] - tile->begin[0] > VD_SLOTS) return 1;
    void (*absorb)(const vd_class_tile &, vd_running_class *, int64_t) =
        plain::absorb_any_classes;
#ifdef VD_X86
    if (isa == 1) absorb = avx2::absorb_any_classes;
    if (isa == 2) absorb = avx512::absorb_any_classes;
#endif
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < tile->rows; ++row) absorb(*tile, running, row);
    return 0;
}
