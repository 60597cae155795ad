// fp16 on a CPU, for cuda_runtime.h beside it: the compiler's own type rounds as CUDA's does.
#pragma once

using __half = _Float16;

inline float __half2float(__half half) { return static_cast<float>(half); }
inline __half __float2half_rn(float value) { return static_cast<__half>(value); }
