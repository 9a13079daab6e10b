// Weights into a bucket and back, on the host: tiles of all slots are shared out among torch's threads.
//
// A tile goes through a stage in the first cache, float32, where it is merged and rounded once. Stores to a bucket that no
// cache holds go past the caches: a store that first reads its line would move half as much again.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "../pack_slots.h"
#include "clones.h"

namespace grpo_fast {
namespace {

constexpr int64_t kTileElements = 1 << 16;
constexpr int64_t kStageElements = 2048;
constexpr int64_t kStreamBytes = int64_t{8} << 20;

GRPO_CLONES void widen_span(const uint16_t* __restrict in, float* __restrict out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = widen(in[i]);
}

GRPO_CLONES void narrow_span(const float* __restrict in, uint16_t* __restrict out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = to_bfloat16(in[i]);
}

GRPO_CLONES void encode_span(const float* __restrict in, float scale, uint8_t* __restrict out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = to_float8(in[i] / scale);
}

GRPO_CLONES void decode_span(const uint8_t* __restrict in, float scale, float* __restrict out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = from_float8(in[i]) * scale;
}

GRPO_CLONES void add_scaled(const float* __restrict in, float factor, float* __restrict out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] += factor * in[i];
}

GRPO_CLONES void add_scaled(const uint16_t* __restrict in, float factor, float* __restrict out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] += factor * widen(in[i]);
}

// Magnitudes order as their bits do, so the maximum is an integer's; a NaN leaves it alone.
GRPO_CLONES float largest_magnitude(const float* in, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = bits_of(in[i]) & 0x7fffffffu;
    const uint32_t number = magnitude > 0x7f800000u ? 0u : magnitude;
    largest = number > largest ? number : largest;
  }
  return float_of(largest);
}

void store(char* out, const char* in, int64_t bytes, bool stream) {
#ifdef __SSE2__
  if (stream) {
    const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<intptr_t>(out) & 15);
    memcpy(out, in, head);
    int64_t at = head;
    for (; at + 64 <= bytes; at += 64) {
      const auto* from = reinterpret_cast<const __m128i*>(in + at);
      auto* to = reinterpret_cast<__m128i*>(out + at);
      const __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1);
      const __m128i c = _mm_loadu_si128(from + 2), d = _mm_loadu_si128(from + 3);
      _mm_stream_si128(to, a);
      _mm_stream_si128(to + 1, b);
      _mm_stream_si128(to + 2, c);
      _mm_stream_si128(to + 3, d);
    }
    memcpy(out + at, in + at, bytes - at);
    return;
  }
#endif
  memcpy(out, in, bytes);
}

void finish_stores() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// Elements [begin, begin + count) of a weight as float32: where they lie, or copied to the stage.
const float* read_span(const Slot& slot, int64_t begin, int64_t count, float* stage) {
  if (slot.weight_is_float32) return static_cast<const float*>(slot.weight) + begin;
  widen_span(static_cast<const uint16_t*>(slot.weight) + begin, stage, count);
  return stage;
}

// W + scale * (B @ A) for one row's columns [begin, begin + count), the products added in the order of the rank.
void merge_span(const Slot& slot, int64_t row, int64_t begin, int64_t count, float* out) {
  const int64_t columns = slot.num_elements / slot.num_rows;
  float update[kStageElements];
  std::fill(update, update + count, 0.0f);
  for (int32_t k = 0; k < slot.rank; ++k) {
    const int64_t at = k * columns + begin, factor = row * slot.rank + k;
    if (slot.lora_is_float32) {
      add_scaled(static_cast<const float*>(slot.lora_a) + at, static_cast<const float*>(slot.lora_b)[factor], update, count);
    } else {
      add_scaled(static_cast<const uint16_t*>(slot.lora_a) + at, widen(static_cast<const uint16_t*>(slot.lora_b)[factor]), update, count);
    }
  }
  const float* weight = read_span(slot, row * columns + begin, count, out);
  if (weight != out) memcpy(out, weight, count * sizeof(float));
  add_scaled(update, slot.lora_scale, out, count);
}

void write_span(const Slot& slot, const float* values, int64_t begin, int64_t count, char* bucket, bool stream) {
  if (slot.format == kFloat32) {
    store(bucket + slot.offset + 4 * begin, reinterpret_cast<const char*>(values), 4 * count, stream);
    return;
  }
  uint16_t rounded[kStageElements];
  narrow_span(values, rounded, count);
  store(bucket + slot.offset + 2 * begin, reinterpret_cast<const char*>(rounded), 2 * count, stream);
}

void pack_plain(const Slot& slot, int64_t begin, int64_t end, char* bucket, bool stream) {
  if (!slot.weight_is_float32 && slot.format == kBFloat16) {
    store(bucket + slot.offset + 2 * begin, static_cast<const char*>(slot.weight) + 2 * begin, 2 * (end - begin), stream);
    return;
  }
  float stage[kStageElements];
  for (int64_t at = begin; at < end; at += kStageElements) {
    const int64_t count = std::min(kStageElements, end - at);
    write_span(slot, read_span(slot, at, count, stage), at, count, bucket, stream);
  }
}

void pack_merged(const Slot& slot, int64_t first_row, int64_t last_row, char* bucket, bool stream) {
  const int64_t columns = slot.num_elements / slot.num_rows;
  float stage[kStageElements];
  for (int64_t begin = 0; begin < columns; begin += kStageElements) {
    const int64_t count = std::min(kStageElements, columns - begin);
    for (int64_t row = first_row; row < last_row; ++row) {
      merge_span(slot, row, begin, count, stage);
      write_span(slot, stage, row * columns + begin, count, bucket, stream);
    }
  }
}

void pack_float8(const Slot& slot, int64_t first_row, int64_t last_row, char* bucket) {
  const int64_t columns = slot.num_elements / slot.num_rows;
  auto* codes = reinterpret_cast<uint8_t*>(bucket + slot.offset);
  auto* scales = reinterpret_cast<float*>(bucket + slot.offset + align_up(slot.num_elements, 16));
  const std::unique_ptr<float[]> merged(slot.rank || !slot.weight_is_float32 ? new float[columns] : nullptr);
  for (int64_t row = first_row; row < last_row; ++row) {
    const float* values = merged.get();
    if (slot.rank) {
      for (int64_t begin = 0; begin < columns; begin += kStageElements) {
        merge_span(slot, row, begin, std::min(kStageElements, columns - begin), merged.get() + begin);
      }
    } else {
      values = read_span(slot, row * columns, columns, merged.get());
    }
    scales[row] = float8_scale(largest_magnitude(values, columns));
    encode_span(values, scales[row], codes + row * columns, columns);
  }
}

void unpack_span(const Slot& slot, int64_t begin, int64_t end, const char* bucket, void* weight) {
  const int64_t columns = slot.num_rows ? slot.num_elements / slot.num_rows : 0;
  const auto* scales = reinterpret_cast<const float*>(bucket + slot.offset + align_up(slot.num_elements, 16));
  float stage[kStageElements];
  for (int64_t at = begin; at < end;) {
    int64_t count = std::min(kStageElements, end - at);
    if (slot.format == kFloat8E4M3) count = std::min(count, columns - at % columns);
    float* wide = slot.weight_is_float32 ? static_cast<float*>(weight) + at : stage;
    auto* narrow = static_cast<uint16_t*>(weight) + (slot.weight_is_float32 ? 0 : at);
    if (slot.format == kBFloat16) {
      const auto* values = reinterpret_cast<const uint16_t*>(bucket + slot.offset) + at;
      if (slot.weight_is_float32) widen_span(values, wide, count);
      else memcpy(narrow, values, 2 * count);
    } else if (slot.format == kFloat32) {
      const auto* values = reinterpret_cast<const float*>(bucket + slot.offset) + at;
      if (slot.weight_is_float32) memcpy(wide, values, 4 * count);
      else narrow_span(values, narrow, count);
    } else {
      decode_span(reinterpret_cast<const uint8_t*>(bucket + slot.offset) + at, scales[at / columns], wide, count);
      if (!slot.weight_is_float32) narrow_span(wide, narrow, count);
    }
    at += count;
  }
}

// Cuts all slots into tiles and runs body(slot, first unit, last unit) on each; a unit is an element, or a row where rows matter.
template <typename Body>
void for_each_tile(const std::vector<Slot>& slots, bool (*by_rows)(const Slot&), const Body& body) {
  std::vector<int64_t> first_tile{0}, tile_units, num_units;
  for (const auto& slot : slots) {
    const bool rows = by_rows(slot);  // also of a slot without columns, whose float8 rows have scales all the same
    num_units.push_back(rows ? slot.num_rows : slot.num_elements);
    tile_units.push_back(
        rows ? std::max<int64_t>(1, kTileElements * slot.num_rows / std::max<int64_t>(1, slot.num_elements)) : kTileElements);
    first_tile.push_back(first_tile.back() + (num_units.back() + tile_units.back() - 1) / tile_units.back());
  }
  torch::stable::parallel_for(0, first_tile.back(), 4, [&](int64_t begin, int64_t end) {
    size_t at = std::upper_bound(first_tile.begin(), first_tile.end(), begin) - first_tile.begin() - 1;
    for (int64_t tile = begin; tile < end; ++tile) {
      while (tile >= first_tile[at + 1]) ++at;
      const int64_t unit = (tile - first_tile[at]) * tile_units[at];
      body(slots[at], at, unit, std::min(unit + tile_units[at], num_units[at]));
    }
    finish_stores();
  });
}

void pack_weights(
    std::vector<Tensor> weights, Tensor bucket, std::vector<int64_t> offsets, std::vector<int64_t> formats, std::vector<Tensor> lora_a,
    std::vector<Tensor> lora_b, std::vector<double> lora_scales) {
  auto slots = read_slots(weights, bucket, offsets, formats);
  add_lora(slots, bucket, lora_a, lora_b, lora_scales);
  auto* out = static_cast<char*>(bucket.mutable_data_ptr());
  const bool stream = bucket.numel() > kStreamBytes;
  const auto by_rows = [](const Slot& slot) { return slot.format == kFloat8E4M3 || slot.rank > 0; };
  for_each_tile(slots, by_rows, [&](const Slot& slot, size_t, int64_t first, int64_t last) {
    if (slot.format == kFloat8E4M3) pack_float8(slot, first, last, out);
    else if (slot.rank) pack_merged(slot, first, last, out, stream);
    else pack_plain(slot, first, last, out, stream);
  });
}

void unpack_weights(Tensor bucket, std::vector<Tensor> weights, std::vector<int64_t> offsets, std::vector<int64_t> formats) {
  const auto slots = read_slots(weights, bucket, offsets, formats);
  const auto* in = static_cast<const char*>(bucket.const_data_ptr());
  const auto by_rows = [](const Slot&) { return false; };
  for_each_tile(slots, by_rows, [&](const Slot& slot, size_t index, int64_t begin, int64_t end) {
    unpack_span(slot, begin, end, in, weights[index].mutable_data_ptr());
  });
}

}  // namespace
}  // namespace grpo_fast

STABLE_TORCH_LIBRARY_IMPL(grpo_fast, CPU, library) {
  library.impl("pack_weights", TORCH_BOX(&grpo_fast::pack_weights));
  library.impl("unpack_weights", TORCH_BOX(&grpo_fast::unpack_weights));
}
