// Number formats of a weight bucket, bit by bit the same on host and device.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define GRPO_INLINE __host__ __device__ __forceinline__
#else
#define GRPO_INLINE inline __attribute__((always_inline))
#endif

namespace grpo_fast {

enum Format : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat8E4M3 = 2 };

constexpr float kMaxFloat8 = 448.0f;

GRPO_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

GRPO_INLINE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

GRPO_INLINE float widen(float value) { return value; }

GRPO_INLINE float widen(uint16_t bfloat16) { return float_of(static_cast<uint32_t>(bfloat16) << 16); }

// Nearest, ties to even. Every NaN becomes 0x7fc0: without that a NaN whose payload lies in the lower half would turn into infinity.
GRPO_INLINE uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// Nearest, ties to even; what is too large becomes 448, as the format has no infinity. The branches are selections, so that
// a loop over it turns into vector code.
GRPO_INLINE uint8_t to_float8(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // From 2^-6 on: 20 bits of the significand fall away, and the exponent's bias goes from 127 to 7.
  const uint32_t normal = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
  // Below, codes are multiples of 2^-9: adding 2^23 in units of 2^-9 leaves the rounded multiple in the lowest bits.
  const uint32_t tiny = bits_of(float_of(magnitude) + 16384.0f) & 0xfu;
  const uint32_t finite = magnitude < 0x3c800000u ? tiny : normal;
  const uint32_t largest = magnitude > 0x43e00000u ? 0x7eu : finite;
  const uint32_t code = magnitude > 0x7f800000u ? 0x7fu : largest;
  return static_cast<uint8_t>(code | ((bits >> 24) & 0x80u));
}

GRPO_INLINE float from_float8(uint8_t code) {
  const uint32_t sign = static_cast<uint32_t>(code & 0x80u) << 24;
  const uint32_t magnitude = code & 0x7fu;
  const float tiny = static_cast<float>(magnitude) * 0.001953125f;
  const float normal = float_of((magnitude << 20) + (120u << 23));
  const float finite = magnitude < 8u ? tiny : normal;
  return float_of(bits_of(magnitude == 0x7fu ? float_of(0x7fc00000u) : finite) | sign);
}

// What a row's codes are multiplied with; 1 for a row of zeros.
GRPO_INLINE float float8_scale(float largest_magnitude) {
  const float scale = largest_magnitude / kMaxFloat8;
  return scale > 0.0f ? scale : 1.0f;
}

GRPO_INLINE int64_t align_up(int64_t size, int64_t alignment) { return (size + alignment - 1) / alignment * alignment; }

// Bytes of a slot: its values and, after float8 codes, one float32 scale a row from the next multiple of 16 on.
GRPO_INLINE int64_t slot_bytes(int64_t format, int64_t num_rows, int64_t num_elements) {
  if (format == kFloat32) return 4 * num_elements;
  if (format == kBFloat16) return 2 * num_elements;
  return align_up(num_elements, 16) + 4 * num_rows;
}

}  // namespace grpo_fast
