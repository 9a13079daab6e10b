// Weights into a bucket and back, on a device: kernels on plain pointers, every slot of a bucket in one launch.
//
// The table of slots travels as a kernel parameter (up to 32,764 bytes since CUDA 12.1), so that no copy precedes a launch; a
// block finds its slot in it by halving. Products and sums are kept apart (--fmad=false), so that the host rounds alike.
#pragma once

#include <cstdint>

#include "../numbers.h"

namespace grpo_fast {

constexpr int kPackThreads = 256;
constexpr int kVector = 8;
constexpr int kThreadVectors = 4;
constexpr int kPlainTile = kPackThreads * kVector * kThreadVectors;
constexpr int kTileRows = 8;
constexpr int kThreadColumns = 4;
constexpr int kTileColumns = kPackThreads * kThreadColumns;
constexpr int kRankChunk = 64;
constexpr int kTableSlots = 512;

struct DeviceSlot {
  void* weight;
  const void* lora_a;
  const void* lora_b;
  char* out;
  int32_t num_elements;
  int32_t num_columns;
  int32_t first_tile;
  int32_t rank;
  float lora_scale;
  uint8_t format;
  uint8_t weight_is_float32;
  uint8_t lora_is_float32;
  uint8_t aligned;  // both sides to 16 bytes
};

struct Table {
  DeviceSlot slots[kTableSlots];
  int32_t num_slots;
};
static_assert(sizeof(Table) <= 32764, "a kernel's parameters end there");

__device__ __forceinline__ const DeviceSlot& slot_of(const Table& table, int tile) {
  int low = 0, high = table.num_slots;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.slots[middle].first_tile <= tile) low = middle;
    else high = middle;
  }
  return table.slots[low];
}

__device__ __forceinline__ int64_t span_end(const DeviceSlot& slot, int64_t begin) {
  return begin + kPlainTile < slot.num_elements ? begin + kPlainTile : slot.num_elements;
}

__device__ __forceinline__ float read_value(const void* values, int64_t at, bool is_float32) {
  return is_float32 ? static_cast<const float*>(values)[at] : widen(static_cast<const uint16_t*>(values)[at]);
}

__device__ __forceinline__ void write_value(void* values, int64_t at, bool is_float32, float value) {
  if (is_float32) static_cast<float*>(values)[at] = value;
  else static_cast<uint16_t*>(values)[at] = to_bfloat16(value);
}

__device__ __forceinline__ uint32_t pair(float low, float high) {
  return to_bfloat16(low) | static_cast<uint32_t>(to_bfloat16(high)) << 16;
}

// Eight values from and to where both sides are aligned: 16 bytes of bfloat16, 32 of float32.
__device__ __forceinline__ void read_vector(const void* values, int64_t at, bool is_float32, float (&out)[kVector]) {
  if (is_float32) {
    const auto* from = reinterpret_cast<const float4*>(static_cast<const float*>(values) + at);
    const float4 a = __ldcs(from), b = __ldcs(from + 1);
    out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w, out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
    return;
  }
  const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(values) + at));
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = float_of(words[i] << 16);
    out[2 * i + 1] = float_of(words[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ void write_vector(void* values, int64_t at, bool is_float32, const float (&in)[kVector]) {
  if (is_float32) {
    auto* to = reinterpret_cast<float4*>(static_cast<float*>(values) + at);
    to[0] = make_float4(in[0], in[1], in[2], in[3]);
    to[1] = make_float4(in[4], in[5], in[6], in[7]);
    return;
  }
  *reinterpret_cast<uint4*>(static_cast<uint16_t*>(values) + at) =
      make_uint4(pair(in[0], in[1]), pair(in[2], in[3]), pair(in[4], in[5]), pair(in[6], in[7]));
}

// A whole aligned tile between a weight and a slot: every load is under way before the first store.
__device__ __forceinline__ void convert_tile(const void* in, bool in_float32, void* out, bool out_float32, int64_t begin) {
  if (!in_float32 && !out_float32) {
    const auto* from = reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(in) + begin) + threadIdx.x;
    auto* to = reinterpret_cast<uint4*>(static_cast<uint16_t*>(out) + begin) + threadIdx.x;
    uint4 bits[kThreadVectors];
#pragma unroll
    for (int i = 0; i < kThreadVectors; ++i) bits[i] = __ldcs(from + i * kPackThreads);
#pragma unroll
    for (int i = 0; i < kThreadVectors; ++i) to[i * kPackThreads] = bits[i];
    return;
  }
  float values[kThreadVectors][kVector];
#pragma unroll
  for (int i = 0; i < kThreadVectors; ++i) {
    read_vector(in, begin + (i * kPackThreads + threadIdx.x) * kVector, in_float32, values[i]);
  }
#pragma unroll
  for (int i = 0; i < kThreadVectors; ++i) {
    write_vector(out, begin + (i * kPackThreads + threadIdx.x) * kVector, out_float32, values[i]);
  }
}

// A tile without LoRA or scales, in either direction. Equal types are copied bit by bit.
__device__ __forceinline__ void convert_span(
    const void* in, bool in_float32, void* out, bool out_float32, bool aligned, int64_t begin, int64_t end) {
  if (aligned && end - begin == kPlainTile) {
    convert_tile(in, in_float32, out, out_float32, begin);
    return;
  }
  for (int64_t at = begin + threadIdx.x; at < end; at += kPackThreads) {
    if (!in_float32 && !out_float32) static_cast<uint16_t*>(out)[at] = static_cast<const uint16_t*>(in)[at];
    else write_value(out, at, out_float32, read_value(in, at, in_float32));
  }
}

// values[r][c]: W + scale * (B @ A) at row first_row + r, column first_column + threadIdx.x + c * kPackThreads; products are
// added in the order of the rank, from 0 on, as on the host. Every thread of the block must come here.
__device__ __forceinline__ void merge_tile(
    const DeviceSlot& slot, int32_t first_row, int32_t num_rows, int32_t first_column, float (*factors)[kRankChunk],
    float (&values)[kTileRows][kThreadColumns]) {
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) {
#pragma unroll
    for (int c = 0; c < kThreadColumns; ++c) values[r][c] = 0.0f;
  }
  for (int32_t chunk = 0; chunk < slot.rank; chunk += kRankChunk) {
    const int32_t depth = min(kRankChunk, slot.rank - chunk);
    __syncthreads();
    for (int i = threadIdx.x; i < kTileRows * depth; i += kPackThreads) {
      const int32_t row = first_row + i / depth, k = i % depth;
      const int64_t at = static_cast<int64_t>(row) * slot.rank + chunk + k;
      factors[i / depth][k] = row < num_rows ? read_value(slot.lora_b, at, slot.lora_is_float32) : 0.0f;
    }
    __syncthreads();
    for (int32_t k = 0; k < depth; ++k) {
#pragma unroll
      for (int c = 0; c < kThreadColumns; ++c) {
        const int32_t column = first_column + threadIdx.x + c * kPackThreads;
        const int64_t at = static_cast<int64_t>(chunk + k) * slot.num_columns + column;
        const float a = column < slot.num_columns ? read_value(slot.lora_a, at, slot.lora_is_float32) : 0.0f;
#pragma unroll
        for (int r = 0; r < kTileRows; ++r) values[r][c] += factors[r][k] * a;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) {
#pragma unroll
    for (int c = 0; c < kThreadColumns; ++c) {
      const int32_t row = first_row + r, column = first_column + threadIdx.x + c * kPackThreads;
      if (row >= num_rows || column >= slot.num_columns) continue;
      const float weight = read_value(slot.weight, static_cast<int64_t>(row) * slot.num_columns + column, slot.weight_is_float32);
      values[r][c] = slot.rank ? weight + slot.lora_scale * values[r][c] : weight;
    }
  }
}

__device__ __forceinline__ void pack_merged(const DeviceSlot& slot, int tile, float (*factors)[kRankChunk]) {
  const int32_t num_rows = slot.num_elements / slot.num_columns;
  const int32_t across = (slot.num_columns + kTileColumns - 1) / kTileColumns;
  const int32_t first_row = tile / across * kTileRows, first_column = tile % across * kTileColumns;
  float values[kTileRows][kThreadColumns];
  merge_tile(slot, first_row, num_rows, first_column, factors, values);
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) {
#pragma unroll
    for (int c = 0; c < kThreadColumns; ++c) {
      const int32_t row = first_row + r, column = first_column + threadIdx.x + c * kPackThreads;
      if (row >= num_rows || column >= slot.num_columns) continue;
      write_value(slot.out, static_cast<int64_t>(row) * slot.num_columns + column, slot.format == kFloat32, values[r][c]);
    }
  }
}

// Eight whole rows: their largest magnitudes first, then their codes; what is read again comes from the second cache.
__device__ __forceinline__ void pack_float8(
    const DeviceSlot& slot, int tile, float (*factors)[kRankChunk], uint32_t (*largest)[kTileRows]) {
  const int32_t num_rows = slot.num_elements / slot.num_columns, first_row = tile * kTileRows;
  float values[kTileRows][kThreadColumns];
  uint32_t magnitudes[kTileRows] = {};
  for (int32_t column = 0; column < slot.num_columns; column += kTileColumns) {
    merge_tile(slot, first_row, num_rows, column, factors, values);
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
#pragma unroll
      for (int c = 0; c < kThreadColumns; ++c) {
        if (first_row + r >= num_rows || column + threadIdx.x + c * kPackThreads >= slot.num_columns) continue;
        const uint32_t magnitude = bits_of(values[r][c]) & 0x7fffffffu;
        if (magnitude <= 0x7f800000u) magnitudes[r] = max(magnitudes[r], magnitude);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) {
    uint32_t most = magnitudes[r];
#pragma unroll
    for (int distance = 16; distance; distance /= 2) most = max(most, __shfl_xor_sync(0xffffffffu, most, distance));
    if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32][r] = most;
  }
  __syncthreads();
  auto* scales = reinterpret_cast<float*>(slot.out + align_up(slot.num_elements, 16));
  float row_scales[kTileRows];
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) {
    uint32_t most = 0;
    for (int warp = 0; warp < kPackThreads / 32; ++warp) most = max(most, largest[warp][r]);
    row_scales[r] = float8_scale(float_of(most));
    if (threadIdx.x == 0 && first_row + r < num_rows) scales[first_row + r] = row_scales[r];
  }
  for (int32_t column = 0; column < slot.num_columns; column += kTileColumns) {
    merge_tile(slot, first_row, num_rows, column, factors, values);
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
#pragma unroll
      for (int c = 0; c < kThreadColumns; ++c) {
        const int32_t row = first_row + r, at = column + threadIdx.x + c * kPackThreads;
        if (row >= num_rows || at >= slot.num_columns) continue;
        slot.out[static_cast<int64_t>(row) * slot.num_columns + at] = static_cast<char>(to_float8(values[r][c] / row_scales[r]));
      }
    }
  }
}

// A bucket that neither merges nor scales gets a kernel without those branches, whose registers would halve the blocks at work.
template <bool kPlain>
__global__ void __launch_bounds__(kPackThreads) pack_weights_kernel(const __grid_constant__ Table table) {
  const DeviceSlot& slot = slot_of(table, blockIdx.x);
  const int tile = blockIdx.x - slot.first_tile;
  if constexpr (!kPlain) {
    __shared__ float factors[kTileRows][kRankChunk];
    __shared__ uint32_t largest[kPackThreads / 32][kTileRows];
    if (slot.format == kFloat8E4M3) {
      pack_float8(slot, tile, factors, largest);
      return;
    }
    if (slot.rank) {
      pack_merged(slot, tile, factors);
      return;
    }
  }
  const int64_t begin = static_cast<int64_t>(tile) * kPlainTile, end = span_end(slot, begin);
  convert_span(slot.weight, slot.weight_is_float32, slot.out, slot.format == kFloat32, slot.aligned, begin, end);
}

__global__ void __launch_bounds__(kPackThreads) unpack_weights_kernel(const __grid_constant__ Table table) {
  const DeviceSlot& slot = slot_of(table, blockIdx.x);
  const int64_t begin = static_cast<int64_t>(blockIdx.x - slot.first_tile) * kPlainTile;
  const int64_t end = span_end(slot, begin);
  if (slot.format != kFloat8E4M3) {
    convert_span(slot.out, slot.format == kFloat32, slot.weight, slot.weight_is_float32, slot.aligned, begin, end);
    return;
  }
  const auto* scales = reinterpret_cast<const float*>(slot.out + align_up(slot.num_elements, 16));
  for (int64_t at = begin + threadIdx.x; at < end; at += kPackThreads) {
    const float value = from_float8(static_cast<uint8_t>(slot.out[at])) * scales[at / slot.num_columns];
    write_value(slot.weight, at, slot.weight_is_float32, value);
  }
}

}  // namespace grpo_fast
