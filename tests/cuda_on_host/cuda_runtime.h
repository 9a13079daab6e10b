// CUDA's execution model on a host, as far as csrc/cuda uses it: blocks run one after the other, a block's threads as fibers that
// take turns where they wait for each other. ThreadSanitizer is told what a barrier orders and nothing more, so that it finds
// what two threads of a block touch without one between. Built by build.py.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#define OF_THE_SCHEDULER __attribute__((no_sanitize_thread))  // what it shares with fibers is in order by their taking turns
#else
#define OF_THE_SCHEDULER
constexpr unsigned __tsan_switch_to_fiber_no_sync = 1;
inline void* __tsan_create_fiber(unsigned) { return nullptr; }
inline void* __tsan_get_current_fiber() { return nullptr; }
inline void __tsan_switch_to_fiber(void*, unsigned) {}
inline void __tsan_destroy_fiber(void*) {}
inline void __tsan_release(void*) {}
inline void __tsan_acquire(void*) {}
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __grid_constant__
#define __shared__ static  // one block at a time

struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) ulonglong2 { uint64_t x, y; };
struct Index { unsigned x; };

inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };

inline Index threadIdx, blockIdx;

// Declared by torch where it is built for CUDA.
inline int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

namespace cuda_on_host {

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 256 * 1024;  // a kernel's parameters lie there too

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, what);
  std::abort();
}

struct Barrier {
  int expected = 0, arrived = 0;
  uint64_t round = 0;
  char places[2] = {};  // of one round and the next: who comes early to that orders nothing for who leaves this late
};

struct Warp {
  Barrier barrier{kLanes};
  alignas(16) char values[kLanes][16];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool done = false;
  void* shadow = __tsan_create_fiber(0);
  ~Fiber() { __tsan_destroy_fiber(shadow); }
};

// A block whose threads all run one function.
class Block {
 public:
  Block(int threads, std::function<void()> body) : fibers_(threads), warps_(threads / kLanes), whole_{threads}, body_(std::move(body)) {}

  // Runs them in turns, each until it waits, and fails where all wait for ever.
  OF_THE_SCHEDULER void run() {
    current = this;
    __tsan_release(&begin_);
    for (auto& fiber : fibers_) {
      getcontext(&fiber.context);
      fiber.context.uc_stack = {fiber.stack.get(), 0, kStackBytes};
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, enter, 0);
    }
    scheduler_shadow_ = __tsan_get_current_fiber();
    for (int left = static_cast<int>(fibers_.size()); left > 0;) {
      moved_ = false;
      for (unsigned thread = 0; thread < fibers_.size(); ++thread) {
        if (fibers_[thread].done) continue;
        threadIdx.x = thread;
        __tsan_switch_to_fiber(fibers_[thread].shadow, __tsan_switch_to_fiber_no_sync);
        swapcontext(&scheduler_, &fibers_[thread].context);
        if (fibers_[thread].done) --left, moved_ = true;
      }
      if (!moved_) fail("waits at a barrier that not every thread comes to");
    }
    __tsan_acquire(&end_);
  }

  OF_THE_SCHEDULER void wait(Barrier& barrier) {
    const unsigned thread = threadIdx.x;
    const uint64_t round = barrier.round;
    __tsan_release(&barrier.places[round % 2]);
    if (++barrier.arrived == barrier.expected) {
      barrier.arrived = 0;
      ++barrier.round;
      moved_ = true;
    } else {
      while (round == barrier.round) leave(thread);
    }
    __tsan_acquire(&barrier.places[round % 2]);
  }

  void wait_for_all() { wait(whole_); }
  Warp& warp() { return warps_[threadIdx.x / kLanes]; }

  static inline Block* current = nullptr;

 private:
  OF_THE_SCHEDULER static void enter() {
    const unsigned thread = threadIdx.x;
    __tsan_acquire(&current->begin_);
    current->body_();
    current->fibers_[thread].done = true;
    current->leave(thread);
  }

  OF_THE_SCHEDULER void leave(unsigned thread) {
    ucontext_t& own = fibers_[thread].context;
    __tsan_release(&end_);  // whoever leaves last has done so before run() ends
    __tsan_switch_to_fiber(scheduler_shadow_, __tsan_switch_to_fiber_no_sync);
    swapcontext(&own, &scheduler_);
  }

  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  Barrier whole_;
  std::function<void()> body_;
  ucontext_t scheduler_;
  bool moved_ = false;
  char begin_ = 0, end_ = 0;
  void* scheduler_shadow_ = nullptr;
};

inline cudaError_t last_error = cudaSuccess;

OF_THE_SCHEDULER inline void set_block(unsigned number) { blockIdx.x = number; }

// kernel<<<blocks, threads, shared, stream>>> without its arguments.
template <typename... Parameters>
auto launch(void (*kernel)(Parameters...), unsigned blocks, int threads, int = 0, cudaStream_t = nullptr) {
  return [=](auto&&... arguments) {
    if (blocks == 0 || threads % kLanes != 0) {
      last_error = cudaErrorInvalidConfiguration;
      return;
    }
    Block block(threads, [&] {
      for (unsigned number = 0; number < blocks; ++number) {
        set_block(number);
        kernel(arguments...);
        Block::current->wait_for_all();  // what is shared goes over to the next
      }
    });
    block.run();
  };
}

inline int own_lane() { return static_cast<int>(threadIdx.x % kLanes); }

template <typename Value>
Value exchange(uint32_t mask, Value value, int from) {
  static_assert(sizeof value <= 16);
  if (mask != 0xffffffffu) fail("parts of a warp are not followed here");
  Warp& warp = Block::current->warp();
  std::memcpy(warp.values[own_lane()], &value, sizeof value);
  Block::current->wait(warp.barrier);
  if (from >= 0 && from < kLanes) std::memcpy(&value, warp.values[from], sizeof value);
  Block::current->wait(warp.barrier);
  return value;
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::Block::current->wait_for_all(); }

template <typename Value>
Value __shfl_xor_sync(uint32_t mask, Value value, int bits) {
  return cuda_on_host::exchange(mask, value, cuda_on_host::own_lane() ^ bits);
}

template <typename Value>
Value __shfl_down_sync(uint32_t mask, Value value, int distance) {
  return cuda_on_host::exchange(mask, value, cuda_on_host::own_lane() + distance);
}

template <typename Value>
Value __shfl_up_sync(uint32_t mask, Value value, int distance) {
  return cuda_on_host::exchange(mask, value, cuda_on_host::own_lane() - distance);
}

template <typename Value>
Value __ldcs(const Value* from) {
  if (reinterpret_cast<uintptr_t>(from) % alignof(Value) != 0) cuda_on_host::fail("reads at an address that is not aligned");
  return *from;
}

inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int __ffs(uint32_t bits) { return __builtin_ffs(static_cast<int>(bits)); }

using std::max;
using std::min;

inline cudaError_t cudaGetLastError() { return std::exchange(cuda_on_host::last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, size);
  return cudaSuccess;
}
