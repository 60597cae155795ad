// Packed weights and their unpacking into panels. C interface, no torch; see
// vllm_diffusion/quant/native.py, whose ctypes structure repeats this one.

#ifndef VD_UNPACK_H
#define VD_UNPACK_H

#include <stdint.h>

#define VD_GROUP 16

enum { VD_FP32 = 0, VD_BF16 = 1 };

// A matrix [rows, inputs]. NVFP4 where group_scale is given, else FP8. An element is
// code * (group_scale * row_scale), both products rounded to fp32.
typedef struct {
    const uint8_t *codes;        // NVFP4: [rows, inputs / 2], E2M1, the earlier one in the low bits;
                                 // FP8: [rows, inputs], E4M3
    const uint8_t *group_scale;  // [rows, inputs / VD_GROUP], E4M3; null for FP8
    const float *row_scale;      // [rows]
    int64_t inputs;              // a multiple of VD_GROUP where group_scale is given
} vd_packed;

#ifdef __cplusplus
#define VD_API extern "C" __attribute__((visibility("default")))
#else
#define VD_API
#endif

// The best instruction set of this processor: 0 plain, 1 AVX2, 2 AVX-512.
VD_API int32_t vd_best_isa(void);

// Write `rows` rows from `first` on, dense, as `dtype`. Returns 0, or 1 where that is not possible.
VD_API int32_t vd_unpack(const vd_packed *matrix, int64_t first, int64_t rows, void *panel,
                         int32_t dtype, int32_t threads, int32_t isa);

#endif
