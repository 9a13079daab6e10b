// What differs between two buckets, on a device: compare, add up, write. Three launches without atomics, in order by design.
#pragma once

#include <cstdint>

#include "../checksum.h"

namespace grpo_fast {

constexpr int kDeltaThreads = 256;
constexpr int kThreadElements = 16;
constexpr int kDeltaTile = kDeltaThreads * kThreadElements;
constexpr int kScanThreads = 512;

template <typename Sum>
__device__ __forceinline__ Sum warp_sum(Sum value) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2) value += __shfl_down_sync(0xffffffffu, value, distance);
  return value;
}

// The sum over the threads before this one, and over all of them in the last argument. Every thread must come here.
template <typename Sum, int kThreads>
__device__ __forceinline__ Sum block_sum_before(Sum value, Sum* warps, Sum& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Sum inclusive = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const Sum other = __shfl_up_sync(0xffffffffu, inclusive, distance);
    if (lane >= distance) inclusive += other;
  }
  if (lane == 31) warps[warp] = inclusive;
  __syncthreads();
  Sum before = 0;
  total = 0;
  for (int i = 0; i < kThreads / 32; ++i) {
    if (i < warp) before += warps[i];
    total += warps[i];
  }
  __syncthreads();
  return before + inclusive - value;
}

// A thread's sixteen elements as 8-byte words; zeros after the end. Full and aligned they come in 16-byte loads.
template <typename Value, bool kAligned>
__device__ __forceinline__ void read_words(
    const Value* values, int64_t begin, int64_t count, uint64_t (&words)[kThreadElements * sizeof(Value) / 8]) {
  constexpr int kWords = kThreadElements * sizeof(Value) / 8, kPerWord = 8 / sizeof(Value);
  if (kAligned && begin + kThreadElements <= count) {
    const auto* from = reinterpret_cast<const ulonglong2*>(values + begin);
#pragma unroll
    for (int i = 0; i < kWords / 2; ++i) {
      const ulonglong2 both = __ldcs(from + i);
      words[2 * i] = both.x;
      words[2 * i + 1] = both.y;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    words[i] = 0;
#pragma unroll
    for (int j = 0; j < kPerWord; ++j) {
      const int64_t at = begin + i * kPerWord + j;
      if (at < count) words[i] |= static_cast<uint64_t>(values[at]) << (8 * sizeof(Value) * j);
    }
  }
}

// Leaves a bit an element, and of each tile how many changed and its part of the checksum.
template <typename Value, bool kAligned>
__global__ void __launch_bounds__(kDeltaThreads) compare_kernel(
    const Value* __restrict__ old, const Value* __restrict__ now, int64_t count, uint16_t* __restrict__ bits,
    int32_t* __restrict__ tile_counts, uint64_t* __restrict__ tile_sums) {
  constexpr int kWords = kThreadElements * sizeof(Value) / 8, kPerWord = 8 / sizeof(Value);
  __shared__ int32_t counts[kDeltaThreads / 32];
  __shared__ uint64_t sums[kDeltaThreads / 32];
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kDeltaThreads + threadIdx.x, begin = thread * kThreadElements;
  uint64_t before[kWords], after[kWords];
  read_words<Value, kAligned>(old, begin, count, before);
  read_words<Value, kAligned>(now, begin, count, after);
  uint32_t changed = 0;
  uint64_t sum = 0;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const uint64_t difference = before[i] ^ after[i];
#pragma unroll
    for (int j = 0; j < kPerWord; ++j) {
      const bool differs = static_cast<Value>(difference >> (8 * sizeof(Value) * j)) != 0;
      changed |= static_cast<uint32_t>(differs) << (i * kPerWord + j);
    }
    sum += checksum_term(after[i], thread * kWords + i);
  }
  bits[thread] = static_cast<uint16_t>(changed);
  const int32_t warp_count = warp_sum(static_cast<int32_t>(__popc(changed)));
  const uint64_t warp_total = warp_sum(sum);
  if (threadIdx.x % 32 == 0) {
    counts[threadIdx.x / 32] = warp_count;
    sums[threadIdx.x / 32] = warp_total;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int32_t tile_count = 0;
    uint64_t tile_sum = 0;
    for (int warp = 0; warp < kDeltaThreads / 32; ++warp) {
      tile_count += counts[warp];
      tile_sum += sums[warp];
    }
    tile_counts[blockIdx.x] = tile_count;
    tile_sums[blockIdx.x] = tile_sum;
  }
}

// One block turns counts into starts, in place, and leaves the count of all and the checksum in totals. Threads take tiles beside
// each other, so that a warp reads whole lines; the next tiles are on their way while these are added up.
__global__ void __launch_bounds__(kScanThreads) add_up_kernel(
    int32_t* __restrict__ tile_counts, const uint64_t* __restrict__ tile_sums, int64_t num_tiles, uint64_t* __restrict__ totals) {
  __shared__ int64_t counts[kScanThreads / 32];
  __shared__ uint64_t sums[kScanThreads / 32];
  int64_t all = 0;
  uint64_t sum = 0;
  int32_t next = threadIdx.x < num_tiles ? tile_counts[threadIdx.x] : 0;
  for (int64_t first = 0; first < num_tiles; first += kScanThreads) {
    const int64_t tile = first + threadIdx.x, after = tile + kScanThreads;
    const int32_t here = next;
    next = after < num_tiles ? tile_counts[after] : 0;
    if (tile < num_tiles) sum += tile_sums[tile];
    int64_t together = 0;
    const int64_t before = block_sum_before<int64_t, kScanThreads>(here, counts, together);
    if (tile < num_tiles) tile_counts[tile] = static_cast<int32_t>(all + before);
    all += together;
  }
  uint64_t checksum = 0;
  block_sum_before<uint64_t, kScanThreads>(sum, sums, checksum);
  if (threadIdx.x == 0) {
    totals[0] = static_cast<uint64_t>(all);
    totals[1] = checksum;
  }
}

template <typename Value>
__global__ void __launch_bounds__(kDeltaThreads) write_kernel(
    const Value* __restrict__ now, const uint16_t* __restrict__ bits, const int32_t* __restrict__ tile_starts,
    int32_t* __restrict__ indices, Value* __restrict__ values) {
  __shared__ int32_t counts[kDeltaThreads / 32];
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kDeltaThreads + threadIdx.x;
  uint32_t changed = bits[thread];
  int32_t total = 0;
  int32_t place = block_sum_before<int32_t, kDeltaThreads>(__popc(changed), counts, total) + tile_starts[blockIdx.x];
  for (; changed; changed &= changed - 1) {
    const int64_t at = thread * kThreadElements + __ffs(changed) - 1;
    indices[place] = static_cast<int32_t>(at);
    values[place++] = now[at];
  }
}

}  // namespace grpo_fast
