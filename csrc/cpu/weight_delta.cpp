// What differs between two buckets, bit by bit and in order, on the host.
//
// The first pass reads both once and leaves a bit an element and a count a block; the second writes from those bits, so that
// blocks without a change cost it nothing.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "../checksum.h"
#include "../delta_buckets.h"

namespace grpo_fast {
namespace {

constexpr int64_t kGroup = 64;
constexpr int64_t kBlock = 1 << 14;

template <typename Value>
uint64_t changed_bits(const Value* old, const Value* now, int64_t count) {
  uint64_t bits = 0;
  for (int64_t i = 0; i < count; ++i) bits |= static_cast<uint64_t>(old[i] != now[i]) << i;
  return bits;
}

#ifdef __SSE2__
inline __m128i equal_bytes(const uint8_t* old, const uint8_t* now) {
  return _mm_cmpeq_epi8(
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(old)), _mm_loadu_si128(reinterpret_cast<const __m128i*>(now)));
}

inline __m128i equal_words(const uint16_t* old, const uint16_t* now) {
  return _mm_cmpeq_epi16(
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(old)), _mm_loadu_si128(reinterpret_cast<const __m128i*>(now)));
}

inline __m128i equal_doubles(const uint32_t* old, const uint32_t* now) {
  return _mm_cmpeq_epi32(
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(old)), _mm_loadu_si128(reinterpret_cast<const __m128i*>(now)));
}

// Sixteen elements' comparisons as bytes: packing with saturation keeps all ones and zeros as they are.
inline __m128i equal_16(const uint8_t* old, const uint8_t* now) { return equal_bytes(old, now); }
inline __m128i equal_16(const uint16_t* old, const uint16_t* now) {
  return _mm_packs_epi16(equal_words(old, now), equal_words(old + 8, now + 8));
}
inline __m128i equal_16(const uint32_t* old, const uint32_t* now) {
  return _mm_packs_epi16(
      _mm_packs_epi32(equal_doubles(old, now), equal_doubles(old + 4, now + 4)),
      _mm_packs_epi32(equal_doubles(old + 8, now + 8), equal_doubles(old + 12, now + 12)));
}

template <typename Value>
uint64_t changed_group(const Value* old, const Value* now) {
  uint64_t bits = 0;
  for (int part = 0; part < 4; ++part) {
    const auto same = static_cast<uint16_t>(_mm_movemask_epi8(equal_16(old + 16 * part, now + 16 * part)));
    bits |= static_cast<uint64_t>(static_cast<uint16_t>(~same)) << (16 * part);
  }
  return bits;
}
#else
template <typename Value>
uint64_t changed_group(const Value* old, const Value* now) {
  return changed_bits(old, now, kGroup);
}
#endif

template <typename Value>
int64_t compare_block(const Value* old, const Value* now, int64_t begin, int64_t end, uint64_t* bits) {
  int64_t count = 0;
  for (int64_t at = begin; at < end; at += kGroup) {
    const uint64_t group = end - at >= kGroup ? changed_group(old + at, now + at) : changed_bits(old + at, now + at, end - at);
    bits[at / kGroup] = group;
    if (group) count += __builtin_popcountll(group);
  }
  return count;
}

template <typename Value>
void emit_block(const Value* now, int64_t begin, int64_t end, const uint64_t* bits, int32_t* indices, Value* values) {
  for (int64_t at = begin; at < end; at += kGroup) {
    for (uint64_t group = bits[at / kGroup]; group; group &= group - 1) {
      const int64_t index = at + __builtin_ctzll(group);
      *indices++ = static_cast<int32_t>(index);
      *values++ = now[index];
    }
  }
}

uint64_t checksum_span(const char* bytes, int64_t begin, int64_t end) {
  uint64_t sum = 0;
  int64_t at = begin;
  for (; at + 8 <= end; at += 8) {
    uint64_t word;
    memcpy(&word, bytes + at, 8);
    sum += checksum_term(word, at / 8);
  }
  if (at < end) {
    uint64_t word = 0;
    memcpy(&word, bytes + at, end - at);
    sum += checksum_term(word, at / 8);
  }
  return sum;
}

template <typename Value>
Delta find_delta(const Tensor& old_bucket, const Tensor& new_bucket, int64_t capacity) {
  const int64_t count = new_bucket.numel(), num_blocks = (count + kBlock - 1) / kBlock;
  const auto* old = static_cast<const Value*>(old_bucket.const_data_ptr());
  const auto* now = static_cast<const Value*>(new_bucket.const_data_ptr());
  const std::unique_ptr<uint64_t[]> bits(new uint64_t[(count + kGroup - 1) / kGroup]);
  std::vector<int64_t> starts(num_blocks + 1, 0);
  std::vector<uint64_t> sums(num_blocks, 0);
  torch::stable::parallel_for(0, num_blocks, 4, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kBlock, end = std::min(count, begin + kBlock), size = sizeof(Value);
      starts[block + 1] = compare_block(old, now, begin, end, bits.get());
      sums[block] = checksum_span(reinterpret_cast<const char*>(now), begin * size, end * size);
    }
  });
  uint64_t sum = 0;
  for (int64_t block = 0; block < num_blocks; ++block) {
    starts[block + 1] += starts[block];
    sum += sums[block];
  }
  const int64_t changed = starts.back();
  Delta delta = new_delta(new_bucket, changed <= capacity ? changed : 0);
  set_totals(delta, changed, sum);
  if (changed == 0 || changed > capacity) return delta;
  auto* indices = static_cast<int32_t*>(delta.indices.mutable_data_ptr());
  auto* values = static_cast<Value*>(delta.values.mutable_data_ptr());
  torch::stable::parallel_for(0, num_blocks, 4, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      if (starts[block] == starts[block + 1]) continue;
      const int64_t begin = block * kBlock;
      emit_block(now, begin, std::min(count, begin + kBlock), bits.get(), indices + starts[block], values + starts[block]);
    }
  });
  return delta;
}

}  // namespace
}  // namespace grpo_fast

STABLE_TORCH_LIBRARY_IMPL(grpo_fast, CPU, library) { library.impl("weight_delta", TORCH_BOX(&grpo_fast::weight_delta)); }
