// bfloat16 on a CPU, for cuda_runtime.h beside it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
    uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 half) {
    const uint32_t word = uint32_t{half.bits} << 16;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

// To nearest, ties to even.
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    if (std::isnan(value)) return {0x7fff};
    uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    return {static_cast<uint16_t>((word + 0x7fff + ((word >> 16) & 1)) >> 16)};
}
