// Rescoring for every instruction set, chosen at run time, rows shared among threads.

#include "rescore.h"

#include <cmath>
#include <cstring>
#include <limits>

namespace {

// The largest numbers of all that were offered, up to `count`.
struct Largest {
    float *values;
    int64_t count;
    int64_t held;
    int64_t least;  // place of the smallest

    float threshold() const {
        return held < count ? -std::numeric_limits<float>::infinity() : values[least];
    }

    void offer(float value) {
        if (held < count)
            values[held++] = value;
        else if (value > values[least])
            values[least] = value;
        else
            return;
        least = 0;
        for (int64_t i = 1; i < held; ++i)
            if (values[i] < values[least]) least = i;
    }
};

}  // namespace

#define VD_PASS "rescore.inc"
#include "each_isa.inc"

extern "C" int32_t vd_rescore(const vd_rescoring *tile, int32_t threads, int32_t isa) {
    if (tile->width < 1 || tile->width > VD_TILE || isa < 0 || isa > vd_best_isa()) return 1;
    if (tile->count < 1 || tile->count > VD_RESCORED) return 1;
    if (tile->dtype != VD_FP32 && tile->dtype != VD_BF16) return 1;
    void (*rescore)(const vd_rescoring &, int64_t) = plain::rescore_any;
#ifdef VD_X86
    if (isa == 1) rescore = avx2::rescore_any;
    if (isa == 2) rescore = avx512::rescore_any;
#endif
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < tile->rows; ++row) rescore(*tile, row);
    return 0;
}
