// One token a row from logits, see grpo_fast/ops/draw_tokens.py.
//
// A row is cut into parts, shared out among torch's threads: first the largest logit, then the mass of every part. The draw
// says in which part the token lies, and only that one is looked at a third time. Sums are float64, in an order that no number
// of threads changes.
#include "few_rows.h"

#ifdef GRPO_HAS_AVX512
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "../require.h"

namespace grpo_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kPart = 4096;

GRPO_AVX512 float largest(const float* logits, int64_t count) {
  const __m512 none = _mm512_set1_ps(-__builtin_inff());
  __m512 most = none;
  __mmask16 unknown = 0;
  for (int64_t at = 0; at < count; at += kLanes) {
    const __m512 values = _mm512_mask_loadu_ps(none, first_lanes(count - at), logits + at);
    unknown |= _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    most = _mm512_max_ps(most, values);
  }
  return unknown ? __builtin_nanf("") : _mm512_reduce_max_ps(most);
}

// What each of 16 logits at the temperature weighs, where `top` weighs 1; 0 beyond the end.
GRPO_AVX512 GRPO_INLINE __m512 masses(const float* logits, int64_t left, float top, float temperature) {
  const __mmask16 lanes = first_lanes(left);
  const __m512 scaled = _mm512_div_ps(_mm512_maskz_loadu_ps(lanes, logits), _mm512_set1_ps(temperature));
  return _mm512_maskz_mov_ps(lanes, exponential(_mm512_sub_ps(scaled, _mm512_set1_ps(top))));
}

GRPO_AVX512 double mass(const float* logits, int64_t count, float top, float temperature) {
  __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
  for (int64_t at = 0; at < count; at += kLanes) {
    const __m512 values = masses(logits + at, count - at, top, temperature);
    low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(values)));
    high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(values), 1))));
  }
  return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
}

// The first token at which the mass exceeds `target`; by rounding none may, then the last that weighs anything.
GRPO_AVX512 int64_t find(const float* logits, int64_t count, float top, float temperature, double target) {
  alignas(64) float values[kLanes];
  double passed = 0;
  int64_t found = 0;
  for (int64_t at = 0; at < count; at += kLanes) {
    _mm512_store_ps(values, masses(logits + at, count - at, top, temperature));
    for (int64_t lane = 0; lane < std::min(kLanes, count - at); ++lane) {
      passed += values[lane];
      if (values[lane] > 0.0f) found = at + lane;
      if (passed > target) return found;
    }
  }
  return found;
}

std::tuple<Tensor, Tensor> draw_tokens(Tensor logits, Tensor draws, double temperature) {
  require(logits.dim() == 2 && logits.size(1) > 0, "logits must be (n, V), V at least 1");
  require(logits.scalar_type() == ScalarType::Float && logits.is_contiguous(), "logits must be float32 and contiguous");
  const int64_t num_rows = logits.size(0), size = logits.size(1), num_parts = (size + kPart - 1) / kPart;
  require(draws.scalar_type() == ScalarType::Double && draws.is_contiguous(), "draws must be float64 and contiguous");
  require(draws.dim() == 1 && draws.numel() == num_rows, "draws must be a vector of ", num_rows);
  require(temperature > 0, "temperature=", temperature, " must be above 0");
  const Tensor tokens = torch::stable::empty({num_rows}, ScalarType::Long);
  const Tensor logprobs = torch::stable::empty({num_rows}, ScalarType::Float);
  const auto* values = static_cast<const float*>(logits.const_data_ptr());
  const auto* drawn = static_cast<const double*>(draws.const_data_ptr());
  auto* chosen = static_cast<int64_t*>(tokens.mutable_data_ptr());
  auto* found = static_cast<float*>(logprobs.mutable_data_ptr());
  const auto heat = static_cast<float>(temperature);

  std::vector<float> tops(num_rows * num_parts);
  std::vector<double> parts(num_rows * num_parts);
  const auto for_each_part = [&](const auto& body) {
    torch::stable::parallel_for(0, num_rows * num_parts, std::max<int64_t>(1, 8 * kPart / size), [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) {
        const int64_t row = at / num_parts, first = at % num_parts * kPart;
        body(at, row, values + row * size + first, std::min(kPart, size - first));
      }
    });
  };
  for_each_part([&](int64_t at, int64_t, const float* from, int64_t count) { tops[at] = largest(from, count); });
  std::vector<float> top(num_rows);
  for (int64_t row = 0; row < num_rows; ++row) {
    const auto from = tops.begin() + row * num_parts;
    top[row] = *from;
    for (auto each = from; each != from + num_parts; ++each) top[row] = *each > top[row] || *each != *each ? *each : top[row];
    top[row] /= heat;
  }
  for_each_part([&](int64_t at, int64_t row, const float* from, int64_t count) { parts[at] = mass(from, count, top[row], heat); });

  for (int64_t row = 0; row < num_rows; ++row) {
    const double* part_masses = parts.data() + row * num_parts;
    double total = 0;
    for (int64_t part = 0; part < num_parts; ++part) total += part_masses[part];
    const double target = drawn[row] * total;
    int64_t part = 0, last = 0;
    double passed = 0;
    for (; part < num_parts && !(passed + part_masses[part] > target); ++part) {
      passed += part_masses[part];
      if (part_masses[part] > 0) last = part;
    }
    if (part == num_parts) part = last;
    const float* from = values + row * size;
    const int64_t token = part * kPart + find(from + part * kPart, std::min(kPart, size - part * kPart), top[row], heat, target - passed);
    chosen[row] = token;
    found[row] = static_cast<float>(static_cast<double>(from[token] / heat) - top[row] - std::log(total));
  }
  return {tokens, logprobs};
}

}  // namespace
}  // namespace grpo_fast

STABLE_TORCH_LIBRARY_IMPL(grpo_fast, CPU, library) {
  if (!__builtin_cpu_supports("avx512f")) return;
  library.impl("draw_tokens", TORCH_BOX(&grpo_fast::draw_tokens));
}
#endif
