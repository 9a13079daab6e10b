// Products of a few rows with weights as they lie, and the vector functions beside them, for processors with AVX-512.
//
// Such a product is bound by reading the weight. It is read once, eight outputs at a time, while the next eight are fetched
// from memory; all rows share what is read, three at a time. The order of a row's sums does not depend on the rows beside it.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

#include "../numbers.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define GRPO_HAS_AVX512 1
// GCC 12 takes what its own intrinsics leave undefined for mistakes of theirs.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#define GRPO_AVX512 __attribute__((target("avx512f")))

namespace grpo_fast {

constexpr int64_t kLanes = 16;
constexpr int kOutputs = 8;
constexpr int kRows = 3;

// Rows that begin on a line of the cache are read in half the time.
struct FreeAligned {
  void operator()(float* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};

// Memory that a thread keeps for its next call: what is taken from the system anew costs more than filling it.
class Room {
 public:
  float* of(int64_t count) {
    if (count > count_) {
      memory_.reset(static_cast<float*>(::operator new(count * sizeof(float), std::align_val_t{64})));
      count_ = count;
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<float, FreeAligned> memory_;
  int64_t count_ = 0;
};

// The first `count` lanes, all of them from 16 on.
GRPO_AVX512 GRPO_INLINE __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= kLanes ? 0xffff : (1 << count) - 1);
}

// Where sums go: out[row * stride + output], plus a bias, plus what is there.
struct Target {
  float* out;
  int64_t stride;
  const float* bias;
  bool adds;
};

// The sum of each of eight vectors: halves are added, then neighbours of all vectors at once.
GRPO_AVX512 GRPO_INLINE __m256 lane_sums(const __m512 (&vectors)[kOutputs]) {
  __m256 halves[kOutputs];
  for (int at = 0; at < kOutputs; ++at) {
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(vectors[at]), 1));
    halves[at] = _mm256_add_ps(_mm512_castps512_ps256(vectors[at]), high);
  }
  const __m256 first = _mm256_hadd_ps(_mm256_hadd_ps(halves[0], halves[1]), _mm256_hadd_ps(halves[2], halves[3]));
  const __m256 last = _mm256_hadd_ps(_mm256_hadd_ps(halves[4], halves[5]), _mm256_hadd_ps(halves[6], halves[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(first, last, 0x20), _mm256_permute2f128_ps(first, last, 0x31));
}

// Meanwhile `ahead` outputs behind these are fetched, from the output `from` of what follows on.
template <int kNumOutputs, int kNumRows>
GRPO_AVX512 void dot_products(
    const float* rows, const float* weight, int64_t size, const Target& to, int64_t from, int64_t ahead) {
  const float* next = weight + (kNumOutputs + from) * size;
  __m512 sums[kNumRows][kOutputs];
  for (auto& row : sums) {
    for (auto& sum : row) sum = _mm512_setzero_ps();
  }
  const int64_t whole = size / kLanes * kLanes;
  for (int64_t at = 0; at < whole; at += kLanes) {
    __m512 values[kNumRows];
    for (int row = 0; row < kNumRows; ++row) values[row] = _mm512_loadu_ps(rows + row * size + at);
    for (int64_t output = 0; output < ahead; ++output) {
      _mm_prefetch(reinterpret_cast<const char*>(next + output * size + at), _MM_HINT_T0);
    }
    for (int output = 0; output < kNumOutputs; ++output) {
      __m512 column = _mm512_loadu_ps(weight + output * size + at);
      __asm__("" : "+v"(column));  // or GCC reads it anew for each row, which takes longer than the sums
      for (int row = 0; row < kNumRows; ++row) sums[row][output] = _mm512_fmadd_ps(values[row], column, sums[row][output]);
    }
  }
  const __mmask16 lanes = first_lanes(kNumOutputs);
  for (int row = 0; row < kNumRows; ++row) {
    __m512 totals = _mm512_castps256_ps512(lane_sums(sums[row]));
    if (whole < size) {
      alignas(64) float rest[kLanes] = {};
      for (int output = 0; output < kNumOutputs; ++output) {
        for (int64_t at = whole; at < size; ++at) rest[output] += rows[row * size + at] * weight[output * size + at];
      }
      totals = _mm512_add_ps(totals, _mm512_load_ps(rest));
    }
    if (to.bias) totals = _mm512_add_ps(totals, _mm512_maskz_loadu_ps(lanes, to.bias));
    float* out = to.out + row * to.stride;
    if (to.adds) totals = _mm512_add_ps(totals, _mm512_maskz_loadu_ps(lanes, out));
    _mm512_mask_storeu_ps(out, lanes, totals);
  }
}

// The same for any number of rows, each few of which fetch their part of what comes next.
template <int kNumOutputs>
GRPO_AVX512 GRPO_INLINE void dot_products(
    const float* rows, int64_t num_rows, const float* weight, int64_t size, const Target& to) {
  const int64_t passes = (num_rows + kRows - 1) / kRows;
  int64_t fetched = 0;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t row = pass * kRows, left = num_rows - row, ahead = kNumOutputs * (pass + 1) / passes - fetched;
    const Target from{to.out + row * to.stride, to.stride, to.bias, to.adds};
    if (left >= kRows) dot_products<kNumOutputs, kRows>(rows + row * size, weight, size, from, fetched, ahead);
    if (left == 2) dot_products<kNumOutputs, 2>(rows + row * size, weight, size, from, fetched, ahead);
    if (left == 1) dot_products<kNumOutputs, 1>(rows + row * size, weight, size, from, fetched, ahead);
    fetched += ahead;
  }
}

// The same for less than eight outputs.
template <int kNumOutputs = kOutputs - 1>
GRPO_AVX512 GRPO_INLINE void dot_products(
    const float* rows, int64_t num_rows, const float* weight, int64_t num_outputs, int64_t size, const Target& to) {
  if (num_outputs == kNumOutputs) {
    dot_products<kNumOutputs>(rows, num_rows, weight, size, to);
  } else if constexpr (kNumOutputs > 1) {
    dot_products<kNumOutputs - 1>(rows, num_rows, weight, num_outputs, size, to);
  }
}

// Rows [num_rows, size] times the transpose of outputs [first, last) of a weight [.., size].
GRPO_AVX512 inline void multiply(
    const float* rows, int64_t num_rows, const float* weight, int64_t size, int64_t first, int64_t last, const Target& to) {
  const auto from = [&](int64_t output) {
    return Target{to.out + output, to.stride, to.bias ? to.bias + output : nullptr, to.adds};
  };
  for (; first + kOutputs <= last; first += kOutputs) {
    dot_products<kOutputs>(rows, num_rows, weight + first * size, size, from(first));
  }
  dot_products(rows, num_rows, weight + first * size, last - first, size, from(first));
}

// e^x, to a unit in the last place; 0 of minus infinity and NaN of NaN.
GRPO_AVX512 GRPO_INLINE __m512 exponential(__m512 x) {
  constexpr float kSeries[] = {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  constexpr float kLog2High = 0.693359375f, kLog2Low = -2.12194440e-4f;
  x = _mm512_min_ps(_mm512_set1_ps(88.72f), _mm512_max_ps(_mm512_set1_ps(-150.0f), x));
  const __m512 doublings = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 left = _mm512_fnmadd_ps(doublings, _mm512_set1_ps(kLog2High), x);
  left = _mm512_fnmadd_ps(doublings, _mm512_set1_ps(kLog2Low), left);
  __m512 result = _mm512_setzero_ps();
  for (const float factor : kSeries) result = _mm512_fmadd_ps(result, left, _mm512_set1_ps(factor));
  return _mm512_scalef_ps(result, doublings);
}

// gate <- silu(gate) * up.
GRPO_AVX512 inline void gated(float* gate, const float* up, int64_t count) {
  for (int64_t at = 0; at < count; at += kLanes) {
    const __mmask16 lanes = first_lanes(count - at);
    const __m512 value = _mm512_maskz_loadu_ps(lanes, gate + at);
    const __m512 below = _mm512_add_ps(_mm512_set1_ps(1.0f), exponential(_mm512_sub_ps(_mm512_setzero_ps(), value)));
    const __m512 silu = _mm512_div_ps(value, below);
    _mm512_mask_storeu_ps(gate + at, lanes, _mm512_mul_ps(silu, _mm512_maskz_loadu_ps(lanes, up + at)));
  }
}

// out <- values / sqrt(mean of squares + epsilon) * weight.
GRPO_AVX512 inline void rms_norm(const float* values, const float* weight, int64_t size, float epsilon, float* out) {
  __m512 squares = _mm512_setzero_ps();
  for (int64_t at = 0; at < size; at += kLanes) {
    const __m512 part = _mm512_maskz_loadu_ps(first_lanes(size - at), values + at);
    squares = _mm512_fmadd_ps(part, part, squares);
  }
  const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(size);
  const __m512 scale = _mm512_set1_ps(1.0f / __builtin_sqrtf(mean + epsilon));
  for (int64_t at = 0; at < size; at += kLanes) {
    const __mmask16 lanes = first_lanes(size - at);
    const __m512 normed = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, values + at), scale);
    _mm512_mask_storeu_ps(out + at, lanes, _mm512_mul_ps(normed, _mm512_maskz_loadu_ps(lanes, weight + at)));
  }
}

// Scores [count] to probabilities.
GRPO_AVX512 inline void softmax(float* scores, int64_t count) {
  __m512 most = _mm512_set1_ps(-__builtin_inff()), total = _mm512_setzero_ps();
  for (int64_t at = 0; at < count; at += kLanes) {
    const __mmask16 lanes = first_lanes(count - at);
    most = _mm512_mask_max_ps(most, lanes, most, _mm512_maskz_loadu_ps(lanes, scores + at));
  }
  const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  for (int64_t at = 0; at < count; at += kLanes) {
    const __mmask16 lanes = first_lanes(count - at);
    const __m512 mass = exponential(_mm512_sub_ps(_mm512_maskz_loadu_ps(lanes, scores + at), top));
    _mm512_mask_storeu_ps(scores + at, lanes, mass);
    total = _mm512_mask_add_ps(total, lanes, total, mass);
  }
  const __m512 scale = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(total));
  for (int64_t at = 0; at < count; at += kLanes) {
    const __mmask16 lanes = first_lanes(count - at);
    _mm512_mask_storeu_ps(scores + at, lanes, _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, scores + at), scale));
  }
}

// out [kNumRows, size] <- what is there, or 0, plus shares [kNumRows, count] (rows `stride` apart) times values [count, size].
// Sums over few rows are taken in several chains, so that none waits for the one before it.
template <int kNumRows>
GRPO_AVX512 void mix(
    const float* shares, int64_t stride, int64_t count, const float* values, int64_t size, float* out, bool adds) {
  constexpr int kChains = kNumRows == 1 ? 4 : 2;
  for (int64_t at = 0; at < size; at += 2 * kLanes) {
    const __mmask16 lanes[2] = {first_lanes(size - at), first_lanes(size - at > kLanes ? size - at - kLanes : 0)};
    __m512 sums[kChains][kNumRows][2];
    for (auto& chain : sums) {
      for (auto& row : chain) row[0] = row[1] = _mm512_setzero_ps();
    }
    const auto add = [&](int64_t position, int chain) GRPO_AVX512 {
      const float* place = values + position * size + at;
      const __m512 value[2] = {_mm512_maskz_loadu_ps(lanes[0], place), _mm512_maskz_loadu_ps(lanes[1], place + kLanes)};
      for (int row = 0; row < kNumRows; ++row) {
        const __m512 share = _mm512_set1_ps(shares[row * stride + position]);
        for (int half = 0; half < 2; ++half) sums[chain][row][half] = _mm512_fmadd_ps(share, value[half], sums[chain][row][half]);
      }
    };
    int64_t position = 0;
    for (; position + kChains <= count; position += kChains) {
      for (int chain = 0; chain < kChains; ++chain) add(position + chain, chain);
    }
    for (; position < count; ++position) add(position, 0);
    for (int row = 0; row < kNumRows; ++row) {
      for (int half = 0; half < 2; ++half) {
        __m512 total = sums[0][row][half];
        for (int chain = 1; chain < kChains; ++chain) total = _mm512_add_ps(total, sums[chain][row][half]);
        float* to = out + row * size + at + half * kLanes;
        if (adds) total = _mm512_add_ps(total, _mm512_maskz_loadu_ps(lanes[half], to));
        _mm512_mask_storeu_ps(to, lanes[half], total);
      }
    }
  }
}

template <int kNumRows = kRows>
GRPO_AVX512 void mix(
    int64_t num_rows, const float* shares, int64_t stride, int64_t count, const float* values, int64_t size, float* out,
    bool adds) {
  for (; num_rows >= kNumRows; num_rows -= kNumRows) {
    mix<kNumRows>(shares, stride, count, values, size, out, adds);
    shares += kNumRows * stride;
    out += kNumRows * size;
  }
  if constexpr (kNumRows > 1) mix<kNumRows - 1>(num_rows, shares, stride, count, values, size, out, adds);
}

// out <- values * cos + (values rolled by half) * sin, for the numbers of one head.
GRPO_AVX512 inline void rotate(
    const float* __restrict values, const float* __restrict cos, const float* __restrict sin, int64_t size, float* __restrict out) {
  const int64_t half = size / 2;
  for (int64_t at = 0; at < half; ++at) {
    const float low = values[at], high = values[half + at];
    out[at] = low * cos[at] + high * sin[at];
    out[half + at] = high * cos[half + at] + low * sin[half + at];
  }
}

}  // namespace grpo_fast
#endif
