// The row pass for a GPU: a block of threads a row, the tile of the row in their registers.
//
// Global memory is read once and written once. The block meets twice: when the row's largest logit
// is known, and when its sums are. No library but CUDA's runtime, no Python, no torch.

#include "row_pass.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>

namespace {

constexpr int threads = 256, lanes = 32, warps = threads / lanes;
constexpr unsigned everyone = 0xffffffff;

// A finite stand-in for -inf, as in vllm_diffusion/head/tile.py.
constexpr float masked = -3e30f;

// A thread holds runs of columns as long as one load, 16 bytes; a run of each thread of a warp is a
// segment of the tile. Segments lie in the order of the ids.
template <typename T>
struct Layout {
    static constexpr int run = 16 / sizeof(T);
    static constexpr int runs = VD_TILE / (threads * run);
    static constexpr int segments = runs * warps;
    static_assert(segments <= lanes, "one warp searches all segments at once");
};

__device__ float widen(float value) { return value; }
__device__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ float widen(__half value) { return __half2float(value); }

template <typename T>
__device__ T narrow(float value);
template <>
__device__ float narrow(float value) {
    return value;
}
template <>
__device__ __nv_bfloat16 narrow(float value) {
    return __float2bfloat16_rn(value);
}
template <>
__device__ __half narrow(float value) {
    return __float2half_rn(value);
}

// The tile's logits of this thread as fp32, 0 where the tile has no column. `whole`: it has them all,
// and they lie as loads of 16 bytes want it.
template <typename T>
__device__ void load(float (&to)[Layout<T>::runs][Layout<T>::run], const T *values, int width,
                     bool whole) {
    constexpr int run = Layout<T>::run, runs = Layout<T>::runs;
    const int begin = static_cast<int>(threadIdx.x) * run;
    if (whole) {
        uint4 packed[runs];
#pragma unroll
        for (int r = 0; r < runs; ++r)  // not through the first cache: nobody reads a logit twice
            packed[r] = __ldcg(reinterpret_cast<const uint4 *>(values + r * threads * run + begin));
#pragma unroll
        for (int r = 0; r < runs; ++r) {
            T raw[run];
            memcpy(raw, &packed[r], sizeof raw);
#pragma unroll
            for (int i = 0; i < run; ++i) to[r][i] = widen(raw[i]);
        }
    } else {
#pragma unroll
        for (int r = 0; r < runs; ++r)
#pragma unroll
            for (int i = 0; i < run; ++i) {
                const int column = r * threads * run + begin + i;
                to[r][i] = column < width ? widen(values[column]) : 0.0f;
            }
    }
}

// One run of weights.
template <typename T>
__device__ void store(T *values, const float (&from)[Layout<T>::run], int begin, int width,
                      bool whole) {
    constexpr int run = Layout<T>::run;
    if (whole) {
        T raw[run];
#pragma unroll
        for (int i = 0; i < run; ++i) raw[i] = narrow<T>(from[i]);
        uint4 packed;
        memcpy(&packed, raw, sizeof raw);
        __stcg(reinterpret_cast<uint4 *>(values + begin), packed);
    } else {
#pragma unroll
        for (int i = 0; i < run; ++i)
            if (begin + i < width) values[begin + i] = narrow<T>(from[i]);
    }
}

// Cephes' tanhf (Moshier), as in the other forms: a polynomial near 0, 1 - 2 / (exp(2 |x|) + 1)
// elsewhere.
__device__ float hyperbolic(float x) {
    const float z = x * x, size = fabsf(x);
    float near = z * -5.70498872745e-3f + 2.06390887954e-2f;
    near = near * z - 5.37397155531e-2f;
    near = near * z + 1.33314422036e-1f;
    near = near * z - 3.33332819422e-1f;
    near = near * z * x + x;
    const float far = 1.0f - __fdividef(2.0f, expf(2.0f * size) + 1.0f);
    return size < 0.625f ? near : copysignf(far, x);
}

// `within` is 1 / softcap. The quotient's remainder mends what its rounding cost.
__device__ float capped(float x, float softcap, float within) {
    const float quotient = x * within;
    const float mended = fmaf(fmaf(-quotient, softcap, x), within, quotient);
    return hyperbolic(mended) * softcap;
}

// The largest logit and the next one, the same if two are equal.
struct Best {
    float top, second;
};

__device__ Best better(const Best &one, const Best &other) {
    return {fmaxf(one.top, other.top),
            fmaxf(fminf(one.top, other.top), fmaxf(one.second, other.second))};
}

__device__ Best best_of_warp(Best mine) {
#pragma unroll
    for (int distance = lanes / 2; distance > 0; distance /= 2)
        mine = better(mine, {__shfl_xor_sync(everyone, mine.top, distance),
                             __shfl_xor_sync(everyone, mine.second, distance)});
    return mine;
}

// What the threads of the block tell each other.
__shared__ Best best_of[warps];
__shared__ int first_best;  // lowest column of the largest logit
__shared__ float mass_of[lanes], moment_of[warps];

__device__ float sum_of_warp(float mine) {
#pragma unroll
    for (int distance = lanes / 2; distance > 0; distance /= 2)
        mine += __shfl_xor_sync(everyone, mine, distance);
    return mine;
}

// The sum of the lanes up to this one.
__device__ float running_sum(float mine, int lane) {
#pragma unroll
    for (int distance = 1; distance < lanes; distance *= 2) {
        const float below = __shfl_up_sync(everyone, mine, distance);
        if (lane >= distance) mine += below;
    }
    return mine;
}

// The first lane whose running sum exceeds the target, never one that adds nothing. Rounding may
// put the target on the total or past it: then the last that adds mass; in a row of NaN lane 0. The
// target becomes what is left of it inside that lane. See vllm_diffusion/head/sample.py, `invert`.
__device__ int first_above(float mass, float cumulative, float &target) {
    const unsigned with_mass = __ballot_sync(everyone, mass > 0.0f);
    const unsigned above = __ballot_sync(everyone, mass > 0.0f && cumulative > target);
    int chosen = 0;
    if (above)
        chosen = __ffs(static_cast<int>(above)) - 1;
    else if (with_mass)
        chosen = lanes - 1 - __clz(static_cast<int>(with_mass));
    target -= __shfl_sync(everyone, cumulative - mass, chosen);
    return chosen;
}

template <typename T>
__global__ void __launch_bounds__(threads)
    absorb_rows(const vd_tile tile, const vd_running running) {
    constexpr int run = Layout<T>::run, runs = Layout<T>::runs, segments = Layout<T>::segments;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % lanes, warp = thread / lanes;
    const int64_t row = blockIdx.x;
    const int width = static_cast<int>(tile.width);
    T *values = static_cast<T *>(tile.values) + row * tile.stride;
    const bool whole =
        width == VD_TILE && reinterpret_cast<uintptr_t>(values) % sizeof(uint4) == 0;
    // Read before the block meets: the first thread writes over them in the end.
    const float before = running.top[row], last_score = running.score[row];
    const float temperature = tile.temperature[row], inverse = 1.0f / temperature;

    float held[runs][run];
    load(held, values, width, whole);
    if (tile.softcap > 0.0f) {
        const float within = 1.0f / tile.softcap;
#pragma unroll
        for (int r = 0; r < runs; ++r)
#pragma unroll
            for (int i = 0; i < run; ++i)
                held[r][i] = capped(held[r][i], tile.softcap, within);
    }
    if (width < VD_TILE) {
#pragma unroll
        for (int r = 0; r < runs; ++r)
#pragma unroll
            for (int i = 0; i < run; ++i)
                if ((r * threads + thread) * run + i >= width) held[r][i] = masked;
    }

    Best best = {masked, masked};
#pragma unroll
    for (int r = 0; r < runs; ++r)
#pragma unroll
        for (int i = 0; i < run; ++i) {
            best.second = fmaxf(best.second, fminf(best.top, held[r][i]));
            best.top = fmaxf(best.top, held[r][i]);
        }
    const float my_top = best.top;
    best = best_of_warp(best);
    if (lane == 0) best_of[warp] = best;
    if (thread == 0) first_best = VD_TILE;
    __syncthreads();
    best = best_of[0];
#pragma unroll
    for (int other = 1; other < warps; ++other) best = better(best, best_of[other]);
    const float now = fmaxf(before, best.top);
    if (my_top == best.top && best.top > before) {
        int column = VD_TILE;
#pragma unroll
        for (int r = runs - 1; r >= 0; --r)
#pragma unroll
            for (int i = run - 1; i >= 0; --i)
                if (held[r][i] == my_top) column = (r * threads + thread) * run + i;
        atomicMin(&first_best, column);
    }

    float run_mass[runs], moment = 0.0f;
#pragma unroll
    for (int r = 0; r < runs; ++r) {
        run_mass[r] = 0.0f;
#pragma unroll
        for (int i = 0; i < run; ++i) {
            const float scaled = (held[r][i] - now) * inverse, weight = __expf(scaled);
            run_mass[r] += weight;
            moment += weight * scaled;
            held[r][i] = weight;
        }
        store(values, held[r], (r * threads + thread) * run, width, whole);
        const float mass = sum_of_warp(run_mass[r]);
        if (lane == 0) mass_of[r * warps + warp] = mass;
    }
    moment = sum_of_warp(moment);
    if (lane == 0) moment_of[warp] = moment;
    __syncthreads();

    // Every warp finds the segment of the draw, the warp that holds it finds the id.
    const float mass = lane < segments ? mass_of[lane] : 0.0f;
    const float cumulative = running_sum(mass, lane);
    const float total = __shfl_sync(everyone, cumulative, lanes - 1);
    const int64_t cell = row * tile.uniform_stride;
    const float score = logf(total) - logf(-logf(tile.gumbel[cell]));
    const float shift = (before - now) / temperature, standing = last_score + shift;
    const bool drawn = score > standing;
    float target = tile.inside[cell] * total;
    const int segment = first_above(mass, cumulative, target);
    if (drawn && warp == segment % warps) {
        float mine[run] = {}, my_mass = 0.0f;
#pragma unroll
        for (int r = 0; r < runs; ++r)  // registers have no addresses
            if (r == segment / warps) {
                my_mass = run_mass[r];
#pragma unroll
                for (int i = 0; i < run; ++i) mine[i] = held[r][i];
            }
        const int chosen = first_above(my_mass, running_sum(my_mass, lane), target);
        int place = 0;
        float sum = 0.0f;
        bool reached = false;
#pragma unroll
        for (int i = 0; i < run; ++i)
            if (!reached && mine[i] > 0.0f) {
                place = i;
                sum += mine[i];
                reached = sum > target;
            }
        if (lane == chosen)
            running.sample[row] =
                tile.first + (segment / warps * threads + thread) * run + place;
    }

    if (thread == 0) {
        const float shrink = expf(shift);
        moment = 0.0f;
#pragma unroll
        for (int other = 0; other < warps; ++other) moment += moment_of[other];
        running.moment[row] =
            shrink * (running.moment[row] + shift * running.mass[row]) + moment;
        running.mass[row] = shrink * running.mass[row] + total;
        const float known = fmaxf(running.second[row], best.second);
        running.second[row] = fmaxf(fminf(before, best.top), known);
        if (best.top > before) running.argmax[row] = tile.first + first_best;
        running.score[row] = drawn ? score : standing;
        running.top[row] = now;
        tile.shrink[row] = shrink;
    }
}

template <typename T>
int32_t launch(const vd_tile &tile, const vd_running &running, void *stream) {
    cudaLaunchConfig_t how = {};
    how.gridDim = dim3(static_cast<unsigned>(tile.rows));
    how.blockDim = dim3(threads);
    how.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&how, absorb_rows<T>, tile, running);
}

}  // namespace

extern "C" int32_t vd_absorb_cuda(const vd_tile *tile, const vd_running *running, void *stream) {
    if (tile->width < 1 || tile->width > VD_TILE || tile->rows < 0 || tile->rows > INT32_MAX)
        return -1;
    if (tile->rows == 0) return 0;
    switch (tile->dtype) {
        case VD_FP32: return launch<float>(*tile, *running, stream);
        case VD_BF16: return launch<__nv_bfloat16>(*tile, *running, stream);
        case VD_FP16: return launch<__half>(*tile, *running, stream);
        default: return -1;
    }
}
