// The policy loss of packed tokens on the host: loss, metrics and dL/dlogp together, see grpo_fast/ops/policy_loss.py.
//
// Tokens are taken in blocks that the first cache holds, and each number is read from memory once (at sequence level twice).
// Terms are float32, sums float64. A part of the tokens, or a sequence, has sums of its own, and these are added in order: a
// repeated call is bitwise the same, whatever the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../numbers.h"
#include "../require.h"
#include "clones.h"

namespace grpo_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 1024;
constexpr int64_t kPart = 8 * kBlock;
constexpr int32_t kInfinityBits = 0x7f800000;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

enum class Surrogate { kClip, kTwoSidedClip, kCispo, kSapo, kVespo };

struct Numbers {
  Surrogate surrogate;
  float low, high, delta, beta, tau_pos, tau_neg;
  bool bias_correction;

  bool clips() const { return surrogate == Surrogate::kClip || surrogate == Surrogate::kTwoSidedClip; }
  bool weighs_tokens() const { return surrogate == Surrogate::kCispo || surrogate == Surrogate::kVespo; }
};

// Sums over some tokens. Extremes are bits of ratios, whose magnitudes order as integers do, a NaN above them all.
struct Sums {
  double loss = 0, kl = 0, entropy = 0, ratio = 0;
  int64_t num_tokens = 0, num_ratios = 0, clip_low = 0, clip_high = 0;
  int32_t least = kInfinityBits, most = -1;

  void add(const Sums& other) {
    loss += other.loss;
    kl += other.kl;
    entropy += other.entropy;
    ratio += other.ratio;
    num_tokens += other.num_tokens;
    num_ratios += other.num_ratios;
    clip_low += other.clip_low;
    clip_high += other.clip_high;
    least = std::min(least, other.least);
    most = std::max(most, other.most);
  }
};

// A block of tokens, masked ones as zeros; where nothing was given, old is logp, and importance, ref and entropy are null.
struct Block {
  int64_t count, num_present;
  const float *logp, *old, *importance, *ref, *entropy;
  const int32_t* present;
  const float *advantage, *weight, *mass;  // mass: weight times importance
  float *ratio, *coefficient;
};

// e^x within two units in the last place, e^0 exactly 1; 0 and infinity where float32 has no normal number, and NaN for NaN.
GRPO_INLINE float exponential(float x) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: sums with it have no bits after the point
  const float shifted = x * 1.44269504f + shift, power = shifted - shift;
  const float rest = x - power * 0.693145751953125f - power * 1.42860677e-6f;
  float sum = 1.9875691500e-4f;
  sum = sum * rest + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  const float of_rest = sum * rest * rest + rest + 1.0f;
  const float value = float_of(bits_of(of_rest) + (bits_of(shifted) << 23));  // the last bits of shifted are the power
  const float bounded = x < -87.3f ? 0.0f : value;
  return x > 88.72283f ? kInfinity : x == x ? bounded : x;
}

struct Terms {
  float value, slope;
};

// The surrogate and its derivative by log r (cispo, vespo: by logp). NaN goes through every minimum.
template <Surrogate kind>
GRPO_INLINE Terms surrogate_terms(float ratio, float logp, float advantage, const Numbers& n) {
  if constexpr (kind == Surrogate::kCispo) {
    const float slope = -(ratio > n.high ? n.high : ratio) * advantage;
    return {slope * logp, slope};
  } else if constexpr (kind == Surrogate::kVespo) {
    return {-advantage * logp, -advantage};
  } else if constexpr (kind == Surrogate::kSapo) {
    const float tau = advantage > 0.0f ? n.tau_pos : n.tau_neg;
    const float argument = tau * (ratio - 1.0f);
    const float decay = exponential(argument < 0.0f ? argument : -argument), whole = 1.0f + decay;
    const float value = -(argument < 0.0f ? decay : 1.0f) / whole * 4.0f / tau * advantage;
    return {value, decay / (whole * whole) * -4.0f * advantage * ratio};
  } else {
    const float raised = ratio < n.low ? n.low : ratio, clipped = raised > n.high ? n.high : raised;
    const float bounded = kind == Surrogate::kTwoSidedClip && ratio > n.delta ? n.delta : ratio;
    const float first = bounded * advantage, second = clipped * advantage, least = second < first ? second : first;
    if constexpr (kind == Surrogate::kClip) return {-least, -((second < first ? 0.0f : 1.0f) * advantage * ratio)};
    // Where both are equal, as they are inside the range, each has half a share, as autograd gives to a minimum.
    const float half = first == second ? 0.5f : 0.0f;
    const float share = first < second ? 1.0f : half, rest = second < first ? 1.0f : half;
    const float of_first = ratio == bounded ? share : 0.0f, of_second = ratio == clipped ? rest : 0.0f;
    return {-least, -(of_first + of_second) * advantage * ratio};
  }
}

template <Surrogate kind>
GRPO_INLINE double token_terms(const Block& block, const Numbers& numbers) {
  const Numbers n = numbers;  // a copy that no store can reach
  const float *__restrict logp = block.logp, *__restrict old = block.old;
  const float *__restrict advantage = block.advantage, *__restrict mass = block.mass;
  float *__restrict ratios = block.ratio, *__restrict coefficient = block.coefficient;
  double loss = 0;
#pragma omp simd reduction(+ : loss)
  for (int64_t i = 0; i < block.count; ++i) {
    const float ratio = exponential(logp[i] - old[i]);
    const Terms terms = surrogate_terms<kind>(ratio, logp[i], advantage[i], n);
    loss += mass[i] * terms.value;
    coefficient[i] = mass[i] * terms.slope;
    ratios[i] = ratio;
  }
  return loss;
}

// Writes ratios and coefficients of tokens with ratios of their own; returns the sum of their losses.
GRPO_CLONES double token_block(const Block& block, const Numbers& n) {
  if (n.surrogate == Surrogate::kClip) return token_terms<Surrogate::kClip>(block, n);
  if (n.surrogate == Surrogate::kTwoSidedClip) return token_terms<Surrogate::kTwoSidedClip>(block, n);
  if (n.surrogate == Surrogate::kCispo) return token_terms<Surrogate::kCispo>(block, n);
  if (n.surrogate == Surrogate::kVespo) return token_terms<Surrogate::kVespo>(block, n);
  return token_terms<Surrogate::kSapo>(block, n);
}

// What is reported of ratios; present is only read where masked.
template <bool masked>
GRPO_INLINE void ratio_terms(const Block& block, float low, float high, Sums& sums) {
  const float *__restrict ratios = block.ratio, *__restrict advantage = block.advantage;
  const int32_t* __restrict present = block.present;
  double total = 0;
  int32_t clip_low = 0, clip_high = 0, least = kInfinityBits, most = -1;
#pragma omp simd reduction(+ : total, clip_low, clip_high) reduction(min : least) reduction(max : most)
  for (int64_t i = 0; i < block.count; ++i) {
    const bool is_there = !masked || present[i];
    const auto bits = static_cast<int32_t>(bits_of(ratios[i]) & 0x7fffffffu);
    const int32_t lower = is_there ? bits : kInfinityBits, upper = is_there ? bits : -1;
    least = lower < least ? lower : least;
    most = upper > most ? upper : most;
    total += is_there ? ratios[i] : 0.0f;
    clip_low += (ratios[i] < low) & (advantage[i] < 0.0f);
    clip_high += (ratios[i] > high) & (advantage[i] > 0.0f);
  }
  sums.ratio += total;
  sums.clip_low += clip_low;
  sums.clip_high += clip_high;
  sums.least = std::min(sums.least, least);
  sums.most = std::max(sums.most, most);
}

GRPO_CLONES void ratio_block(const Block& block, float low, float high, Sums& sums) {
  if (block.num_present < block.count) ratio_terms<true>(block, low, high, sums);
  else ratio_terms<false>(block, low, high, sums);
}

// Adds the KL term of tokens with ratios of their own to their coefficients and to the sums.
template <bool corrected>
GRPO_INLINE void token_kl_terms(const Block& block, float beta, Sums& sums) {
  const float *__restrict logp = block.logp, *__restrict ref = block.ref, *__restrict weight = block.weight;
  const float* __restrict ratios = block.ratio;
  float* __restrict coefficient = block.coefficient;
  double loss = 0, total = 0;
#pragma omp simd reduction(+ : loss, total)
  for (int64_t i = 0; i < block.count; ++i) {
    const float difference = ref[i] - logp[i], growth = exponential(difference);
    const float plain = growth - difference - 1.0f;
    const float kl = corrected ? plain * ratios[i] : plain;
    // A token's own ratio: r·(kl + 1 - e^difference) is this, without its cancellation.
    const float slope = corrected ? -difference * ratios[i] : 1.0f - growth;
    loss += weight[i] * (beta * kl);
    coefficient[i] += weight[i] * (beta * slope);
    total += kl;
  }
  sums.loss += loss;
  sums.kl += total;
}

GRPO_CLONES void token_kl_block(const Block& block, const Numbers& n, Sums& sums) {
  if (n.bias_correction) token_kl_terms<true>(block, n.beta, sums);
  else token_kl_terms<false>(block, n.beta, sums);
}

GRPO_CLONES double sum_block(const float* values, int64_t count) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += values[i];
  return sum;
}

GRPO_CLONES double difference_block(const float* values, const float* others, int64_t count) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += values[i] - others[i];
  return sum;
}

GRPO_CLONES double plain_kl_block(const float* ref, const float* logp, int64_t count) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    const float difference = ref[i] - logp[i];
    sum += exponential(difference) - difference - 1.0f;
  }
  return sum;
}

GRPO_CLONES void sequence_coefficients(const Block& block, float slope, float kl_weight) {
  const float *__restrict logp = block.logp, *__restrict ref = block.ref;
  const int32_t* __restrict present = block.present;
  float* __restrict coefficient = block.coefficient;
  if (ref) {
    for (int64_t i = 0; i < block.count; ++i) {
      const float value = slope + kl_weight * (1.0f - exponential(ref[i] - logp[i]));
      coefficient[i] = present[i] ? value : 0.0f;
    }
  } else {
    for (int64_t i = 0; i < block.count; ++i) coefficient[i] = present[i] ? slope : 0.0f;
  }
}

GRPO_CLONES void keep_present(const float* values, const int32_t* present, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = present[i] ? values[i] : 0.0f;
}

GRPO_CLONES int64_t widen_mask(const uint8_t* __restrict mask, int32_t* __restrict out, int64_t count) {
  int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    out[i] = mask[i];
    sum += mask[i];
  }
  return sum;
}

GRPO_CLONES void multiply(const float* __restrict values, const float* __restrict others, float* __restrict out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = values[i] * others[i];
}

template <typename Index>
GRPO_INLINE bool ascends_span(const Index* index, int64_t begin, int64_t end) {
  int32_t falls = 0;
#pragma omp simd reduction(| : falls)
  for (int64_t i = begin; i < end; ++i) falls |= index[i] > index[i + 1];
  return falls == 0;
}

GRPO_CLONES bool ascends_long(const int64_t* index, int64_t begin, int64_t end) { return ascends_span(index, begin, end); }
GRPO_CLONES bool ascends_int(const int32_t* index, int64_t begin, int64_t end) { return ascends_span(index, begin, end); }

// An ascending index of either width.
class SequenceIndex {
 public:
  explicit SequenceIndex(const Tensor& index) : wide_(index.scalar_type() == ScalarType::Long), data_(index.const_data_ptr()) {}

  int64_t operator[](int64_t at) const {
    return wide_ ? static_cast<const int64_t*>(data_)[at] : static_cast<const int32_t*>(data_)[at];
  }

  bool ascends(int64_t begin, int64_t end) const {
    return wide_ ? ascends_long(static_cast<const int64_t*>(data_), begin, end)
                 : ascends_int(static_cast<const int32_t*>(data_), begin, end);
  }

  // The first token from begin on whose sequence lies after one, by strides that double: sequences are short beside all tokens.
  int64_t end_of(int64_t sequence, int64_t begin, int64_t end) const {
    int64_t stride = 1;
    while (begin + stride <= end && (*this)[begin + stride - 1] <= sequence) {
      begin += stride;
      stride *= 2;
    }
    end = std::min(end, begin + stride - 1);
    while (begin < end) {
      const int64_t middle = begin + (end - begin) / 2;
      if ((*this)[middle] <= sequence) begin = middle + 1;
      else end = middle;
    }
    return begin;
  }

 private:
  bool wide_;
  const void* data_;
};

// What a call reads; absent inputs are null.
struct Inputs {
  const float *logp, *old, *ref, *importance, *entropy;
  const uint8_t* mask;
  const float *advantages, *weights;
  SequenceIndex index;
  int64_t num_tokens, num_sequences;
  float* coefficients;
};

// Room for a block's numbers where they are not read as they lie.
struct Stage {
  float logp[kBlock], old[kBlock], ref[kBlock], importance[kBlock], entropy[kBlock];
  float advantage[kBlock], weight[kBlock], mass[kBlock], ratio[kBlock];
  int32_t present[kBlock];

  Stage() { std::fill(present, present + kBlock, 1); }
};

const float* read_span(const float* values, const Inputs& in, int64_t begin, int64_t count, const int32_t* present, float* stage) {
  if (!values || !in.mask) return values ? values + begin : nullptr;
  keep_present(values + begin, present, stage, count);
  return stage;
}

Block read_block(const Inputs& in, int64_t begin, int64_t count, Stage& stage) {
  const int64_t num_present = in.mask ? widen_mask(in.mask + begin, stage.present, count) : count;
  const auto read = [&](const float* values, float* room) { return read_span(values, in, begin, count, stage.present, room); };
  const float *logp = read(in.logp, stage.logp), *old = in.old ? read(in.old, stage.old) : logp;
  return {
      count, num_present, logp, old, read(in.importance, stage.importance), read(in.ref, stage.ref), read(in.entropy, stage.entropy),
      stage.present, stage.advantage, stage.weight, in.importance ? stage.mass : stage.weight, stage.ratio, in.coefficients + begin};
}

void spread_sequences(const Inputs& in, int64_t begin, int64_t count, Stage& stage) {
  for (int64_t at = 0; at < count;) {
    const int64_t sequence = std::clamp<int64_t>(in.index[begin + at], 0, in.num_sequences - 1);
    const int64_t end = std::max(at + 1, in.index.end_of(sequence, begin + at, begin + count) - begin);
    std::fill(stage.advantage + at, stage.advantage + end, in.advantages[sequence]);
    std::fill(stage.weight + at, stage.weight + end, in.weights[sequence]);
    at = end;
  }
  if (in.mask) {
    keep_present(stage.advantage, stage.present, stage.advantage, count);
    keep_present(stage.weight, stage.present, stage.weight, count);
  }
}

void token_part(const Inputs& in, const Numbers& n, int64_t begin, int64_t end, Stage& stage, Sums& sums) {
  const bool bounds = n.clips() || n.surrogate == Surrogate::kCispo;
  const float low = n.clips() ? n.low : -kInfinity, high = bounds ? n.high : kInfinity;
  for (int64_t at = begin; at < end; at += kBlock) {
    const Block block = read_block(in, at, std::min(kBlock, end - at), stage);
    spread_sequences(in, at, block.count, stage);
    if (block.importance) multiply(stage.weight, block.importance, stage.mass, block.count);
    sums.num_tokens += block.num_present;
    sums.loss += token_block(block, n);
    ratio_block(block, low, high, sums);
    if (block.ref) token_kl_block(block, n, sums);
    if (block.entropy) sums.entropy += sum_block(block.entropy, block.count);
  }
  sums.num_ratios = sums.num_tokens;
}

// Of the sequence with tokens [begin, end): its ratio is the mean's, or the sum's, exponential.
void whole_sequence(
    const Inputs& in, const Numbers& n, bool mean, int64_t sequence, int64_t begin, int64_t end, Stage& stage, Sums& sums) {
  double log_ratio = 0, importance = 0, kl = 0;
  for (int64_t at = begin; at < end; at += kBlock) {
    const Block block = read_block(in, at, std::min(kBlock, end - at), stage);
    log_ratio += difference_block(block.logp, block.old, block.count);
    sums.num_tokens += block.num_present;
    if (block.importance) importance += sum_block(block.importance, block.count);
    if (block.ref) kl += plain_kl_block(block.ref, block.logp, block.count);
    if (block.entropy) sums.entropy += sum_block(block.entropy, block.count);
  }
  const double length = mean ? std::max<int64_t>(sums.num_tokens, 1) : 1;
  const float ratio = exponential(static_cast<float>(log_ratio / length));
  const float advantage = in.advantages[sequence], weight = in.weights[sequence];
  const Terms terms = n.surrogate == Surrogate::kSapo ? surrogate_terms<Surrogate::kSapo>(ratio, 0.0f, advantage, n)
                                                      : surrogate_terms<Surrogate::kTwoSidedClip>(ratio, 0.0f, advantage, n);
  const float mass = in.importance ? importance : sums.num_tokens, factor = n.bias_correction ? ratio : 1.0f;
  float value = terms.value * mass, slope = terms.slope * mass;
  if (in.ref) {
    sums.kl = kl * factor;
    value += n.beta * static_cast<float>(sums.kl);
    if (n.bias_correction) slope += n.beta * static_cast<float>(sums.kl);
  }
  sums.loss = weight * value;
  slope = static_cast<float>(slope / length) * weight;
  for (int64_t at = begin; at < end; at += kBlock) {
    sequence_coefficients(read_block(in, at, std::min(kBlock, end - at), stage), slope, weight * n.beta * factor);
  }
  if (sums.num_tokens == 0) return;
  const auto bits = static_cast<int32_t>(bits_of(ratio) & 0x7fffffffu);
  sums.num_ratios = 1;
  sums.ratio = ratio;
  sums.least = std::min(bits, kInfinityBits);
  sums.most = bits;
  if (n.clips()) {
    sums.clip_low = (ratio < n.low) & (advantage < 0.0f);
    sums.clip_high = (ratio > n.high) & (advantage > 0.0f);
  }
}

std::vector<Sums> by_token(const Inputs& in, const Numbers& n) {
  const int64_t num_parts = (in.num_tokens + kPart - 1) / kPart;
  std::vector<Sums> parts(num_parts);
  torch::stable::parallel_for(0, num_parts, 1, [&](int64_t first, int64_t last) {
    Stage stage;
    for (int64_t part = first; part < last; ++part) {
      token_part(in, n, part * kPart, std::min(in.num_tokens, (part + 1) * kPart), stage, parts[part]);
    }
  });
  return parts;
}

std::vector<Sums> by_sequence(const Inputs& in, const Numbers& n, bool mean) {
  std::vector<Sums> parts(in.num_sequences);
  const int64_t grain = std::max<int64_t>(1, in.num_sequences * kPart / std::max<int64_t>(1, in.num_tokens));
  torch::stable::parallel_for(0, in.num_sequences, grain, [&](int64_t first, int64_t last) {
    Stage stage;
    int64_t begin = in.index.end_of(first - 1, 0, in.num_tokens);
    for (int64_t sequence = first; sequence < last; ++sequence) {
      const int64_t end = in.index.end_of(sequence, begin, in.num_tokens);
      whole_sequence(in, n, mean, sequence, begin, end, stage, parts[sequence]);
      begin = end;
    }
  });
  return parts;
}

Tensor float_vector(const Tensor& values, int64_t size, const char* name) {
  require(values.dim() == 1 && values.numel() == size, name, " must be a vector of ", size);
  const Tensor wide = values.scalar_type() == ScalarType::Float ? values : torch::stable::to(values, ScalarType::Float);
  return torch::stable::contiguous(wide);
}

std::optional<Tensor> float_vector(const std::optional<Tensor>& values, int64_t size, const char* name) {
  return values ? std::optional(float_vector(*values, size, name)) : std::nullopt;
}

const float* floats(const std::optional<Tensor>& values) {
  return values ? static_cast<const float*>(values->const_data_ptr()) : nullptr;
}

Tensor checked_index(const Tensor& index, int64_t num_tokens) {
  const auto type = index.scalar_type();
  require(type == ScalarType::Long || type == ScalarType::Int, "sequence_index must be int64 or int32");
  require(index.dim() == 1 && index.numel() == num_tokens, "sequence_index must be a vector of ", num_tokens);
  return torch::stable::contiguous(index);
}

Numbers read_numbers(const std::string& surrogate, const std::vector<double>& values, bool two_sided, bool bias_correction) {
  require(values.size() == 7, "numbers has ", values.size(), " values; it must have 7");
  const std::pair<const char*, Surrogate> known[] = {
      {"clip", two_sided ? Surrogate::kTwoSidedClip : Surrogate::kClip},
      {"cispo", Surrogate::kCispo},
      {"sapo", Surrogate::kSapo},
      {"vespo", Surrogate::kVespo}};
  const auto* kind = std::find_if(std::begin(known), std::end(known), [&](const auto& each) { return surrogate == each.first; });
  require(kind != std::end(known), "surrogate=", surrogate, "; the extension knows clip, cispo, sapo and vespo");
  const auto at = [&](int i) { return static_cast<float>(values[i]); };
  return {kind->second, at(0), at(1), at(2), at(3), at(4), at(5), bias_correction};
}

Tensor totals(const std::vector<Sums>& parts, double entropy_slope) {
  Sums all;
  for (const Sums& part : parts) all.add(part);
  const bool unknown = all.most > kInfinityBits;
  const float least = float_of(static_cast<uint32_t>(unknown ? all.most : all.least));
  const float most = all.most < 0 ? -kInfinity : float_of(static_cast<uint32_t>(all.most));
  const Tensor result = torch::stable::empty({10}, ScalarType::Float);
  auto* out = static_cast<float*>(result.mutable_data_ptr());
  const double values[] = {
      all.loss + (entropy_slope != 0 ? entropy_slope * all.entropy : 0.0), double(all.num_tokens), double(all.num_ratios),
      double(all.clip_low), double(all.clip_high), all.kl, all.entropy, all.ratio, least, most};
  std::copy(std::begin(values), std::end(values), out);
  return result;
}

std::tuple<Tensor, Tensor> policy_loss(
    Tensor logprobs, std::optional<Tensor> entropy, Tensor sequence_index, Tensor advantages, Tensor loss_weights,
    std::optional<Tensor> old_logprobs, std::optional<Tensor> ref_logprobs, std::optional<Tensor> importance_weights,
    std::optional<Tensor> token_mask, std::string surrogate, std::string level, std::vector<double> numbers, bool two_sided,
    bool bias_correction) {
  const int64_t num_tokens = logprobs.numel(), num_sequences = advantages.numel();
  const Numbers n = read_numbers(surrogate, numbers, two_sided, bias_correction);
  const bool by_token_level = level == "token";
  require(by_token_level || !n.weighs_tokens(), "surrogate=", surrogate, " weighs single tokens; level=", level);
  require(num_tokens == 0 || num_sequences > 0, num_tokens, " tokens of no sequence");
  const Tensor logp = float_vector(logprobs, num_tokens, "logprobs"), index = checked_index(sequence_index, num_tokens);
  const auto old = float_vector(old_logprobs, num_tokens, "old_logprobs");
  const auto ref = float_vector(ref_logprobs, num_tokens, "ref_logprobs");
  const auto importance = float_vector(importance_weights, num_tokens, "importance_weights");
  const auto spread = float_vector(entropy, num_tokens, "entropy");
  const Tensor advantage = float_vector(advantages, num_sequences, "advantages");
  const Tensor weight = float_vector(loss_weights, num_sequences, "loss_weights");
  Tensor mask = logp;
  if (token_mask) {
    require(token_mask->scalar_type() == ScalarType::Bool, "token_mask must be boolean");
    require(token_mask->dim() == 1 && token_mask->numel() == num_tokens, "token_mask must be a vector of ", num_tokens);
    mask = torch::stable::contiguous(*token_mask);
  }
  const Tensor coefficients = torch::stable::empty({num_tokens}, ScalarType::Float);
  const Inputs in{
      floats(logp), floats(old), floats(ref), floats(importance), floats(spread),
      token_mask ? static_cast<const uint8_t*>(mask.const_data_ptr()) : nullptr, floats(advantage), floats(weight),
      SequenceIndex(index), num_tokens, num_sequences, static_cast<float*>(coefficients.mutable_data_ptr())};
  const auto parts = by_token_level ? by_token(in, n) : by_sequence(in, n, level == "sequence");
  return {totals(parts, numbers[6]), coefficients};
}

bool ascends(Tensor index) {
  const Tensor values = checked_index(index, index.numel());
  const SequenceIndex order(values);
  std::atomic<bool> holds = true;
  torch::stable::parallel_for(0, std::max<int64_t>(0, values.numel() - 1), 4 * kPart, [&](int64_t begin, int64_t end) {
    if (!order.ascends(begin, end)) holds = false;
  });
  return holds;
}

}  // namespace
}  // namespace grpo_fast

STABLE_TORCH_LIBRARY_IMPL(grpo_fast, CPU, library) {
  library.impl("policy_loss", TORCH_BOX(&grpo_fast::policy_loss));
  library.impl("ascends", TORCH_BOX(&grpo_fast::ascends));
}
