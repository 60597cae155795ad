// As much of CUDA as csrc/head/row_pass.cu says, on a CPU: one block of threads at a time.
//
// Every thread of the block is a fibre. It runs until it meets others, in a barrier of the block or
// in a shuffle or ballot of its warp, and waits there until all of them have come; who runs next is
// drawn, from `emulate_order`'s seed. A missing barrier therefore shows as another result under
// another seed. Shared memory is full of NaN when a block begins. Ends with an error code, and a
// line on stderr: threads that wait for each other forever, lanes of a warp that meet in different
// operations, loads and stores of 16 bytes at other addresses.
//
// It is no GPU: exp2f and logf are the host's, memory is coherent, and nothing is said of time.
#pragma once

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include <ucontext.h>

#define __global__
#define __device__
#define __launch_bounds__(threads)
#define __shared__ static __attribute__((section("emulated_shared")))
extern "C" __attribute__((visibility("hidden"))) char __start_emulated_shared, __stop_emulated_shared;

struct dim3 {
    unsigned x;
    dim3(unsigned size = 1) : x(size) {}
};
struct uint4 {
    uint32_t x, y, z, w;
};

using cudaStream_t = void *;
enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    cudaStream_t stream;
};

static dim3 threadIdx, blockIdx;

namespace emulated {

constexpr unsigned lanes = 32, most_threads = 1024, stack_bytes = 1 << 16;

// Where threads meet: the block, or a warp.
struct Meeting {
    unsigned members, came = 0;
    const void *what = nullptr;  // the operation of the first that came
    std::vector<unsigned> waiting;
};

struct Thread {
    jmp_buf here;
    ucontext_t start;
    std::unique_ptr<char[]> stack;
};

struct Warp {
    Meeting meeting;
    // What the lanes say: two, since one may say the next thing before another has heard the last.
    uint32_t words[2][lanes];
    unsigned turn[lanes];
    std::vector<unsigned> ready;
};

static std::vector<Thread> threads;
static std::vector<Warp> warps;
static std::vector<unsigned> order;  // of warps, the first goes before all others
static Meeting block;
static unsigned running, alive;
static std::function<void()> kernel;
static ucontext_t outside;
static std::mt19937 draw;
static const char *failure;

[[noreturn]] static void leave() {
    setcontext(&outside);
    __builtin_unreachable();
}

[[noreturn]] static void fail(const char *why) {
    failure = why;
    leave();
}

[[noreturn]] static void run_another() {
    for (const unsigned warp : order) {
        std::vector<unsigned> &ready = warps[warp].ready;
        if (ready.empty()) continue;
        std::swap(ready[draw() % ready.size()], ready.back());
        running = threadIdx.x = ready.back();
        ready.pop_back();
        _longjmp(threads[running].here, 1);
    }
    fail("threads wait for each other forever");
}

static void begin() {
    kernel();
    if (--alive == 0) leave();
    run_another();
}

__attribute__((noinline)) static void meet(Meeting &meeting, const void *what) {
    const unsigned me = running;
    if (meeting.came == 0) meeting.what = what;
    if (meeting.what != what) fail("lanes of a warp meet in different operations");
    meeting.waiting.push_back(me);
    if (++meeting.came == meeting.members) {
        for (const unsigned thread : meeting.waiting) warps[thread / lanes].ready.push_back(thread);
        meeting.waiting.clear();
        meeting.came = 0;
    }
    if (_setjmp(threads[me].here) == 0) run_another();
}

static void run_block(unsigned count) {
    memset(&__start_emulated_shared, 0xff, &__stop_emulated_shared - &__start_emulated_shared);
    threads.resize(count);
    warps = std::vector<Warp>(count / lanes);
    for (Warp &warp : warps) warp.meeting.members = lanes;
    order.resize(warps.size());
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin(), order.end(), draw);
    block = Meeting{};
    block.members = alive = count;
    for (unsigned index = 0; index < count; ++index) {
        Thread &thread = threads[index];
        if (!thread.stack) thread.stack.reset(new char[stack_bytes]);
        // The fibre leaves for the place below as soon as it begins: from then on a jump, which
        // asks nothing of the kernel, resumes it.
        static ucontext_t back;
        static unsigned born;
        getcontext(&thread.start);
        thread.start.uc_stack = {thread.stack.get(), 0, stack_bytes};
        thread.start.uc_link = nullptr;
        makecontext(&thread.start, [] {
            if (_setjmp(threads[born].here) == 0) setcontext(&back);
            begin();
        }, 0);
        born = index;
        swapcontext(&back, &thread.start);
        warps[index / lanes].ready.push_back(index);
    }
    static bool started;
    started = false;
    getcontext(&outside);
    if (!started) {
        started = true;
        run_another();
    }
}

// What every lane of the warp says, once all have said it.
static const uint32_t *said_by_warp(uint32_t word, const void *what) {
    Warp &warp = warps[running / lanes];
    const unsigned lane = running % lanes, turn = warp.turn[lane]++ % 2;
    warp.words[turn][lane] = word;
    meet(warp.meeting, what);
    return warp.words[turn];
}

template <typename T>
T from_lane(T mine, unsigned lane, const void *what) {
    static_assert(sizeof(T) == 4);
    uint32_t word;
    memcpy(&word, &mine, 4);
    word = said_by_warp(word, what)[lane];
    memcpy(&mine, &word, 4);
    return mine;
}

static unsigned all_of(unsigned mask) {
    if (mask != 0xffffffff) fail("a part of a warp shuffles, which is not emulated");
    return running % lanes;
}

static void check_aligned(const void *address) {
    if (reinterpret_cast<uintptr_t>(address) % 16) fail("16 bytes at an address that does not fit");
}

// Every operation has its own address.
static const char up{}, across{}, lane{}, vote{}, barrier{};

}  // namespace emulated

extern "C" __attribute__((visibility("default"))) void emulate_order(uint32_t seed) {
    emulated::draw.seed(seed);
}

inline void __syncthreads() { emulated::meet(emulated::block, &emulated::barrier); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T mine, unsigned distance) {
    return emulated::from_lane(mine, emulated::all_of(mask) ^ distance, &emulated::across);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T mine, unsigned distance) {
    const unsigned lane = emulated::all_of(mask);
    return emulated::from_lane(mine, lane < distance ? lane : lane - distance, &emulated::up);
}

template <typename T>
T __shfl_sync(unsigned mask, T mine, unsigned source) {
    emulated::all_of(mask);
    return emulated::from_lane(mine, source % emulated::lanes, &emulated::lane);
}

inline unsigned __ballot_sync(unsigned mask, bool mine) {
    emulated::all_of(mask);
    const uint32_t *said = emulated::said_by_warp(mine, &emulated::vote);
    unsigned ballot = 0;
    for (unsigned lane = 0; lane < emulated::lanes; ++lane) ballot |= said[lane] << lane;
    return ballot;
}

inline int __ffs(int word) { return __builtin_ffs(word); }
inline int __clz(int word) { return word ? __builtin_clz(static_cast<unsigned>(word)) : 32; }
inline float __fdividef(float one, float other) { return one / other; }
inline float __expf(float x) { return exp2f(x * 1.44269504f); }  // the product rounds there too

inline int atomicMin(int *where, int value) {
    const int before = *where;
    if (value < before) *where = value;
    return before;
}

inline uint4 __ldcg(const uint4 *from) {
    emulated::check_aligned(from);
    uint4 value;
    memcpy(&value, static_cast<const void *>(from), sizeof value);
    return value;
}

inline void __stcg(uint4 *to, uint4 value) {
    emulated::check_aligned(to);
    memcpy(static_cast<void *>(to), &value, sizeof value);
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *how, void (*kernel)(Parameters...),
                               Arguments &&...arguments) {
    emulated::failure = nullptr;
    if (how->blockDim.x % emulated::lanes || how->blockDim.x > emulated::most_threads)
        emulated::failure = "that many threads are no block";
    emulated::kernel = [&] { kernel(arguments...); };
    for (unsigned row = 0; row < how->gridDim.x && !emulated::failure; ++row) {
        blockIdx.x = row;
        emulated::run_block(how->blockDim.x);
    }
    if (emulated::failure) std::fprintf(stderr, "emulated block: %s\n", emulated::failure);
    return emulated::failure ? cudaErrorLaunchFailure : cudaSuccess;
}
