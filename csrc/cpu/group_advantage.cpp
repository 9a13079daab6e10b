// Advantages of groups of rewards on the host, see grpo_fast/ops/group_advantage.py.
//
// Groups are taken in tiles that the first cache holds: statistics of every row first, then all that is one number a row, row
// beside row, then the advantages. Everything is float64 inside. Rows of usual lengths have loops of their own, unrolled.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <tuple>

#include "../numbers.h"
#include "../require.h"
#include "clones.h"

namespace grpo_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTileRewards = 2048;
constexpr int64_t kTileRows = 128;

// Of each row how many rewards there are, their mean, and the sum of squares around it: 0 exactly where all are equal.
struct Rows {
  double *count, *mean, *squares;
};

// The sum of equal float32 rewards is exact in float64, and so is their mean; of float64 ones neither is.
GRPO_INLINE bool mean_is_exact(const float*, int64_t) { return true; }
GRPO_INLINE bool mean_is_exact(const double* rewards, int64_t size) {
  int64_t differ = 0;
#pragma omp simd reduction(| : differ)
  for (int64_t i = 0; i < size; ++i) differ |= rewards[i] != rewards[0];
  return differ != 0;
}

// The sum of term(0), term(1), ... in eight lanes and a tree of them: no sum waits for the one before it.
template <typename Term>
GRPO_INLINE double tree_sum(int64_t size, const Term& term) {
  double lanes[8] = {};
  int64_t at = 0;
  for (; at + 8 <= size; at += 8) {
    for (int lane = 0; lane < 8; ++lane) lanes[lane] += term(at + lane);
  }
  for (; at < size; ++at) lanes[at % 8] += term(at);
  for (int half = 4; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// Of rows without a NaN; a size that the compiler knows stands in kSize, otherwise it is 0. Returns whether there was none.
template <int kSize, typename Value>
GRPO_INLINE bool measure_full(const Value* __restrict rewards, int64_t num_rows, int64_t any_size, const Rows& out) {
  const int64_t size = kSize ? kSize : any_size;
  double *__restrict counts = out.count, *__restrict means = out.mean, *__restrict all_squares = out.squares;
  for (int64_t row = 0; row < num_rows; ++row) {
    const Value* values = rewards + row * size;
    const double sum = tree_sum(size, [&](int64_t i) { return static_cast<double>(values[i]); });
    const double mean = mean_is_exact(values, size) ? sum / static_cast<double>(size) : values[0];
    const double squares = tree_sum(size, [&](int64_t i) { return (values[i] - mean) * (values[i] - mean); });
    counts[row] = static_cast<double>(size);
    means[row] = mean;
    all_squares[row] = squares;
  }
  int64_t missing = 0;
#pragma omp simd reduction(| : missing)
  for (int64_t row = 0; row < num_rows; ++row) missing |= means[row] != means[row];
  return missing == 0;
}

template <typename Value>
void measure_with_holes(const Value* rewards, int64_t num_rows, int64_t size, const Rows& out) {
  for (int64_t row = 0; row < num_rows; ++row) {
    const Value* values = rewards + row * size;
    double sum = 0, count = 0, squares = 0;
    Value least = std::numeric_limits<Value>::infinity(), most = -least;
    for (int64_t i = 0; i < size; ++i) {
      if (values[i] != values[i]) continue;
      sum += values[i];
      count += 1;
      least = std::min(least, values[i]);
      most = std::max(most, values[i]);
    }
    const double mean = least == most ? least : sum / std::max(count, 1.0);
    for (int64_t i = 0; i < size; ++i) {
      if (values[i] == values[i]) squares += (values[i] - mean) * (values[i] - mean);
    }
    out.count[row] = count;
    out.mean[row] = mean;
    out.squares[row] = squares;
  }
}

template <typename Value>
GRPO_INLINE void measure_tile(const Value* rewards, int64_t num_rows, int64_t size, const Rows& out) {
  const bool full = size == 16  ? measure_full<16>(rewards, num_rows, size, out)
                    : size == 8 ? measure_full<8>(rewards, num_rows, size, out)
                    : size == 4 ? measure_full<4>(rewards, num_rows, size, out)
                                : measure_full<0>(rewards, num_rows, size, out);
  if (!full) measure_with_holes(rewards, num_rows, size, out);
}

struct Scale {
  bool leave_one_out, by_group;
  double divisor;  // of every advantage; in addition to its group's standard deviation where it is by group
};

template <typename Value>
struct Outputs {
  Value *advantages, *mean, *std;
  bool* zero_variance;
};

template <int kSize, typename Value>
GRPO_INLINE void write_rows(
    const Value* __restrict rewards, int64_t num_rows, int64_t any_size, const double* __restrict means,
    const double* __restrict factors, Value* __restrict out) {
  const int64_t size = kSize ? kSize : any_size;
  for (int64_t row = 0; row < num_rows; ++row) {
    const double mean = means[row], factor = factors[row];
    for (int64_t i = row * size; i < (row + 1) * size; ++i) {
      const auto value = static_cast<Value>((rewards[i] - mean) * factor);
      out[i] = rewards[i] == rewards[i] ? value : Value{0};
    }
  }
}

template <typename Value>
GRPO_INLINE void finish_tile(
    const Value* rewards, int64_t num_rows, int64_t size, const Rows& rows, const Scale& scale, const Outputs<Value>& out) {
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  const double *__restrict counts = rows.count, *__restrict means = rows.mean, *__restrict squares = rows.squares;
  const bool leave_one_out = scale.leave_one_out;
  const double share = scale.by_group ? 1.0 : 0.0, divisor = scale.divisor;
  double factors[kTileRows];
  for (int64_t row = 0; row < num_rows; ++row) {
    const double count = counts[row], others = count > 2.0 ? count - 1.0 : 1.0, std = std::sqrt(squares[row] / others);
    const double factor = (leave_one_out ? count / others : 1.0) / (share * std + divisor);
    factors[row] = squares[row] == 0.0 ? 0.0 : factor;
    out.mean[row] = static_cast<Value>(count > 0.0 ? means[row] : kNan);
    out.std[row] = static_cast<Value>(count > 1.0 ? std : kNan);
  }
  for (int64_t row = 0; row < num_rows; ++row) out.zero_variance[row] = squares[row] == 0.0;
  if (size == 16) write_rows<16>(rewards, num_rows, size, means, factors, out.advantages);
  else if (size == 8) write_rows<8>(rewards, num_rows, size, means, factors, out.advantages);
  else if (size == 4) write_rows<4>(rewards, num_rows, size, means, factors, out.advantages);
  else write_rows<0>(rewards, num_rows, size, means, factors, out.advantages);
}

GRPO_CLONES void measure(const float* rewards, int64_t num_rows, int64_t size, const Rows& out) {
  measure_tile(rewards, num_rows, size, out);
}

GRPO_CLONES void measure(const double* rewards, int64_t num_rows, int64_t size, const Rows& out) {
  measure_tile(rewards, num_rows, size, out);
}

GRPO_CLONES void finish(
    const float* rewards, int64_t num_rows, int64_t size, const Rows& rows, const Scale& scale, const Outputs<float>& out) {
  finish_tile(rewards, num_rows, size, rows, scale, out);
}

GRPO_CLONES void finish(
    const double* rewards, int64_t num_rows, int64_t size, const Rows& rows, const Scale& scale, const Outputs<double>& out) {
  finish_tile(rewards, num_rows, size, rows, scale, out);
}

// The standard deviation of every reward, from what is known of the rows, taken in their order.
double batch_std(const Rows& rows, int64_t num_rows) {
  double count = 0, total = 0, squares = 0;
  for (int64_t row = 0; row < num_rows; ++row) {
    count += rows.count[row];
    total += rows.count[row] * rows.mean[row];
  }
  const double mean = total / std::max(count, 1.0);
  for (int64_t row = 0; row < num_rows; ++row) {
    const double gap = rows.mean[row] - mean;
    squares += rows.squares[row] + rows.count[row] * gap * gap;
  }
  return std::sqrt(squares / std::max(count - 1.0, 1.0));
}

// Calls body(first row, rows) for all tiles.
template <typename Body>
void for_each_tile(int64_t num_rows, int64_t size, const Body& body) {
  const int64_t tile = std::clamp<int64_t>(kTileRewards / size, 1, kTileRows), num_tiles = (num_rows + tile - 1) / tile;
  torch::stable::parallel_for(0, num_tiles, std::max<int64_t>(1, 4 * kTileRewards / (tile * size)), [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) body(at * tile, std::min(tile, num_rows - at * tile));
  });
}

template <typename Value>
void advantages_of(const Value* rewards, int64_t num_rows, int64_t size, Scale scale, bool by_batch, const Outputs<Value>& out) {
  const auto finish_rows = [&](int64_t row, int64_t count, const Rows& rows) {
    const Outputs<Value> here{out.advantages + row * size, out.mean + row, out.std + row, out.zero_variance + row};
    finish(rewards + row * size, count, size, rows, scale, here);
  };
  if (!by_batch) {
    for_each_tile(num_rows, size, [&](int64_t row, int64_t count) {
      double counts[kTileRows], means[kTileRows], squares[kTileRows];
      const Rows rows{counts, means, squares};
      measure(rewards + row * size, count, size, rows);
      finish_rows(row, count, rows);
    });
    return;
  }
  const std::unique_ptr<double[]> numbers(new double[3 * num_rows]);
  const auto from = [&](int64_t row) { return Rows{&numbers[row], &numbers[num_rows + row], &numbers[2 * num_rows + row]}; };
  for_each_tile(num_rows, size, [&](int64_t row, int64_t count) { measure(rewards + row * size, count, size, from(row)); });
  scale.divisor += batch_std(from(0), num_rows);
  for_each_tile(num_rows, size, [&](int64_t row, int64_t count) { finish_rows(row, count, from(row)); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_advantage(
    Tensor rewards, std::string scale_rewards, bool leave_one_out, double epsilon) {
  const auto type = rewards.scalar_type();
  require(type == ScalarType::Float || type == ScalarType::Double, "rewards must be float32 or float64");
  require(rewards.dim() == 2 && rewards.size(1) > 0, "rewards must be (P, G), G at least 1");
  const bool by_group = scale_rewards == "group", by_batch = scale_rewards == "batch";
  require(by_group || by_batch || scale_rewards == "none", "scale_rewards=", scale_rewards, "; choose group, batch or none");
  const Tensor values = torch::stable::contiguous(rewards);
  const int64_t num_rows = values.size(0), size = values.size(1);
  const Tensor advantages = torch::stable::empty({num_rows, size}, type);
  const Tensor zero_variance = torch::stable::empty({num_rows}, ScalarType::Bool);
  const Tensor mean = torch::stable::empty({num_rows}, type), std = torch::stable::empty({num_rows}, type);
  const auto run = [&](auto zero) {
    using Value = decltype(zero);
    const auto at = [](const Tensor& tensor) { return static_cast<Value*>(tensor.mutable_data_ptr()); };
    const Outputs<Value> out{at(advantages), at(mean), at(std), static_cast<bool*>(zero_variance.mutable_data_ptr())};
    const Scale scale{leave_one_out, by_group, by_group || by_batch ? epsilon : 1.0};
    advantages_of(static_cast<const Value*>(values.const_data_ptr()), num_rows, size, scale, by_batch, out);
  };
  if (num_rows > 0) type == ScalarType::Float ? run(0.0f) : run(0.0);
  return {advantages, zero_variance, mean, std};
}

}  // namespace
}  // namespace grpo_fast

STABLE_TORCH_LIBRARY_IMPL(grpo_fast, CPU, library) {
  library.impl("group_advantage", TORCH_BOX(&grpo_fast::group_advantage));
}
