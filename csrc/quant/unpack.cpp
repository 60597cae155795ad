// Unpacking for every instruction set, chosen at run time, rows shared among threads.

#include "unpack.h"

#include <cmath>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VD_X86 1
#include <immintrin.h>
#endif

namespace {

const float e2m1[16] = {0.f,  .5f,  1.f,  1.5f,  2.f,  3.f,  4.f,  6.f,
                        -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f};

// Every E4M3 number. 0x7f and 0xff are NaN in the format; the loader refuses them.
struct E4m3 {
    float values[256];
    uint16_t upper[128];  // of the magnitudes, the upper half of the fp32: the lower one is 0
    E4m3() {
        for (int code = 0; code < 256; ++code) {
            const int exponent = code >> 3 & 15, fraction = code & 7;
            const float size =
                std::ldexp(exponent ? 8.f + fraction : fraction, (exponent ? exponent : 1) - 10);
            values[code] = code & 128 ? -size : size;
            uint32_t bits;
            std::memcpy(&bits, &size, sizeof bits);
            if (code < 128) upper[code] = (uint16_t)(bits >> 16);
        }
    }
    float operator[](int code) const { return values[code]; }
};
const E4m3 e4m3;

inline void one(float *to, float value) { *to = value; }

inline void one(uint16_t *to, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    *to = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

namespace plain {

template <typename Out>
void unpack_fp4(const vd_packed &matrix, int64_t row, Out *out) {
    const uint8_t *codes = matrix.codes + row * (matrix.inputs / 2);
    const uint8_t *scales = matrix.group_scale + row * (matrix.inputs / VD_GROUP);
    for (int64_t i = 0; i < matrix.inputs; i += 2) {
        const float scale = e4m3[scales[i / VD_GROUP]] * matrix.row_scale[row];
        one(out + i, e2m1[codes[i / 2] & 15] * scale);
        one(out + i + 1, e2m1[codes[i / 2] >> 4] * scale);
    }
}

template <typename Out>
void unpack_fp8(const vd_packed &matrix, int64_t row, Out *out) {
    const uint8_t *codes = matrix.codes + row * matrix.inputs;
    for (int64_t i = 0; i < matrix.inputs; ++i) one(out + i, e4m3[codes[i]] * matrix.row_scale[row]);
}

}  // namespace plain

}  // namespace

#ifdef VD_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace {
namespace avx2 {
#define VD_LANES 8
#include "unpack.inc"
#undef VD_LANES
}  // namespace avx2
}  // namespace
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
namespace {
namespace avx512 {
#define VD_LANES 16
#include "unpack.inc"
#undef VD_LANES
}  // namespace avx512
}  // namespace
#pragma GCC pop_options
#endif

VD_API int32_t vd_best_isa(void) {
#ifdef VD_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2")) return 1;
#endif
    return 0;
}

namespace {

template <typename Out>
void unpack(const vd_packed &matrix, int64_t first, int64_t rows, Out *panel, int32_t threads,
            int32_t isa) {
    const bool fp4 = matrix.group_scale != nullptr;
    void (*row_of)(const vd_packed &, int64_t, Out *) =
        fp4 ? plain::unpack_fp4<Out> : plain::unpack_fp8<Out>;
#ifdef VD_X86
    if (isa == 1) row_of = fp4 ? avx2::unpack_fp4<Out> : avx2::unpack_fp8<Out>;
    if (isa == 2) row_of = fp4 ? avx512::unpack_fp4<Out> : avx512::unpack_fp8<Out>;
#endif
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; ++row)
        row_of(matrix, first + row, panel + row * matrix.inputs);
}

}  // namespace

VD_API int32_t vd_unpack(const vd_packed *matrix, int64_t first, int64_t rows, void *panel,
                         int32_t dtype, int32_t threads, int32_t isa) {
    if (isa < 0 || isa > vd_best_isa()) return 1;
    if (matrix->group_scale != nullptr && matrix->inputs % VD_GROUP) return 1;
    if (dtype == VD_FP32)
        unpack(*matrix, first, rows, (float *)panel, threads, isa);
    else if (dtype == VD_BF16)
        unpack(*matrix, first, rows, (uint16_t *)panel, threads, isa);
    else
        return 1;
    return 0;
}
