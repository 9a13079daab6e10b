// Sequences into bins of a token budget: first-fit and best-fit decreasing, whichever needs fewer bins.
//
// Sequences of one length go into a bin together: where one was the right choice, the next is until the bin is full, as its
// room only shrinks and every better bin is too small already. So searches are counted by bins and lengths, not by sequences.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#include "../require.h"

namespace grpo_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rooms of all bins, opened or not, under a tree of maxima; a bin that is not open yet has the whole budget.
class FirstFit {
 public:
  FirstFit(int64_t max_bins, int64_t budget) : budget_(budget) {
    while (leaves_ < max_bins) leaves_ *= 2;
    rooms_.assign(2 * leaves_, budget);
  }

  std::pair<int64_t, int64_t> find(int64_t length) {
    int64_t node = 1;
    while (node < leaves_) node = rooms_[2 * node] >= length ? 2 * node : 2 * node + 1;
    num_bins_ = std::max(num_bins_, node - leaves_ + 1);
    return {node - leaves_, rooms_[node]};
  }

  void fill(int64_t bin, int64_t tokens) {
    int64_t node = bin + leaves_;
    rooms_[node] -= tokens;
    while (node /= 2) {
      const int64_t room = std::max(rooms_[2 * node], rooms_[2 * node + 1]);
      if (rooms_[node] == room) break;
      rooms_[node] = room;
    }
  }

  int64_t num_bins() const { return num_bins_; }

 private:
  int64_t budget_;
  int64_t leaves_ = 1;
  int64_t num_bins_ = 0;
  std::vector<int64_t> rooms_;
};

// Opened bins by room and number; for budgets of any size.
class BestFit {
 public:
  BestFit(int64_t, int64_t budget) : budget_(budget) {}

  std::pair<int64_t, int64_t> find(int64_t length) {
    const auto tightest = rooms_.lower_bound({length, -1});
    if (tightest == rooms_.end()) return {num_bins_++, room_ = budget_};
    const auto [room, bin] = *tightest;
    rooms_.erase(tightest);
    return {bin, room_ = room};
  }

  void fill(int64_t bin, int64_t tokens) { rooms_.insert({room_ - tokens, bin}); }

  int64_t num_bins() const { return num_bins_; }

 private:
  int64_t budget_;
  int64_t room_ = 0;
  int64_t num_bins_ = 0;
  std::set<std::pair<int64_t, int64_t>> rooms_;
};

// The same for budgets that an array can have a place for each room of: a heap of bins a room, and a tree of bits that tells,
// 64 rooms a word, which heaps hold any.
class DenseBestFit {
 public:
  DenseBestFit(int64_t, int64_t budget) : budget_(budget), bins_(budget + 1) {
    for (int64_t size = budget + 1; levels_.empty() || size > 1;) {
      size = (size + 63) / 64;
      levels_.emplace_back(size, 0);
    }
  }

  std::pair<int64_t, int64_t> find(int64_t length) {
    room_ = tightest(length);
    if (room_ < 0) return {num_bins_++, room_ = budget_};
    auto& heap = bins_[room_];
    std::pop_heap(heap.begin(), heap.end(), std::greater<>());
    const int64_t bin = heap.back();
    heap.pop_back();
    int64_t at = room_;
    if (heap.empty()) {
      for (auto& level : levels_) {
        level[at / 64] &= ~(uint64_t{1} << (at % 64));
        if (level[at / 64]) break;
        at /= 64;
      }
    }
    return {bin, room_};
  }

  void fill(int64_t bin, int64_t tokens) {
    auto& heap = bins_[room_ - tokens];
    heap.push_back(static_cast<int32_t>(bin));
    std::push_heap(heap.begin(), heap.end(), std::greater<>());
    int64_t at = room_ - tokens;
    for (auto& level : levels_) {
      level[at / 64] |= uint64_t{1} << (at % 64);
      at /= 64;
    }
  }

  int64_t num_bins() const { return num_bins_; }

 private:
  // The least room of at least a length that some bin has: up until a word has a bit from there on, then down; -1 without one.
  int64_t tightest(int64_t length) const {
    int64_t at = length;
    for (size_t up = 0; up < levels_.size(); ++up) {
      const auto& level = levels_[up];
      const int64_t word = at / 64;
      if (word >= static_cast<int64_t>(level.size())) return -1;
      const uint64_t rest = level[word] & (~uint64_t{0} << (at % 64));
      if (rest) {
        at = word * 64 + __builtin_ctzll(rest);
        for (size_t down = up; down-- > 0;) at = at * 64 + __builtin_ctzll(levels_[down][at]);
        return at;
      }
      at = word + 1;
    }
    return -1;
  }

  int64_t budget_;
  int64_t room_ = 0;
  int64_t num_bins_ = 0;
  std::vector<std::vector<int32_t>> bins_;
  std::vector<std::vector<uint64_t>> levels_;
};

constexpr int64_t kDenseBudget = 1 << 20;

// From the longest to the shortest, ties by index; what is longer than the budget comes first of all.
std::vector<int32_t> by_length(const int64_t* lengths, int64_t count, int64_t budget) {
  std::vector<int32_t> order(count);
  const int64_t longest = count ? *std::max_element(lengths, lengths + count) : 0;
  if (longest > std::max<int64_t>(4 * count, 1 << 16)) {
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return lengths[a] > lengths[b]; });
    return order;
  }
  std::vector<int64_t> starts(longest + 2, 0);
  for (int64_t i = 0; i < count; ++i) ++starts[longest - lengths[i] + 1];
  std::partial_sum(starts.begin(), starts.end(), starts.begin());
  for (int64_t i = 0; i < count; ++i) order[starts[longest - lengths[i]]++] = static_cast<int32_t>(i);
  return order;
}

struct Plan {
  std::vector<int32_t> bins;  // of each place in the order
  int64_t num_bins;
};

template <typename Fit>
Plan place(const std::vector<int32_t>& order, const int64_t* lengths, int64_t budget, int64_t max_bins) {
  const int64_t count = order.size();
  Plan plan{std::vector<int32_t>(count), 0};
  int64_t at = 0;
  for (; at < count && lengths[order[at]] > budget; ++at) plan.bins[at] = static_cast<int32_t>(at);
  const int64_t alone = at;
  Fit fit(max_bins, budget);
  while (at < count) {
    const int64_t length = lengths[order[at]];
    const auto [bin, room] = fit.find(length);
    int64_t taken = 0;
    for (int64_t left = room / length; taken < left && at < count && lengths[order[at]] == length; ++taken) {
      plan.bins[at++] = static_cast<int32_t>(alone + bin);
    }
    fit.fill(bin, taken * length);
  }
  plan.num_bins = alone + fit.num_bins();
  return plan;
}

std::tuple<Tensor, Tensor> pack_sequences(Tensor lengths, int64_t token_budget) {
  require(
      lengths.scalar_type() == ScalarType::Long && lengths.dim() == 1 && lengths.is_contiguous(),
      "lengths must be a contiguous int64 vector");
  require(token_budget >= 1, "token_budget=", token_budget, "; it must be at least 1");
  const int64_t count = lengths.numel();
  require(count <= INT32_MAX, count, " sequences; at most 2^31 - 1 can be packed");
  const auto* sizes = static_cast<const int64_t*>(lengths.const_data_ptr());
  int64_t total = 0, fewest = 0;  // of those within the budget: their sum, and how many no two of which share a bin
  for (int64_t i = 0; i < count; ++i) {
    require(sizes[i] >= 1 && sizes[i] <= INT32_MAX, "lengths[", i, "]=", sizes[i], "; each must be at least 1 and fit int32");
    if (sizes[i] > token_budget) continue;
    total += sizes[i];
    fewest += 2 * sizes[i] > token_budget;
  }
  const auto order = by_length(sizes, count, token_budget);
  const int64_t bound = std::max((total - 1) / token_budget + 1, fewest);
  // No two bins of any-fit are both at most half full.
  Plan plan = place<FirstFit>(order, sizes, token_budget, std::min(count, 2 * ((total - 1) / token_budget + 1)) + 1);
  const int64_t alone = std::count_if(sizes, sizes + count, [&](int64_t size) { return size > token_budget; });
  if (plan.num_bins - alone > bound) {
    Plan best = token_budget <= kDenseBudget ? place<DenseBestFit>(order, sizes, token_budget, 0)
                                             : place<BestFit>(order, sizes, token_budget, 0);
    if (best.num_bins < plan.num_bins) plan = std::move(best);
  }

  std::vector<int64_t> tokens(plan.num_bins, 0), sequences(plan.num_bins, 0);
  for (int64_t at = 0; at < count; ++at) {
    tokens[plan.bins[at]] += sizes[order[at]];
    ++sequences[plan.bins[at]];
  }
  std::vector<int32_t> ranked(plan.num_bins);
  std::iota(ranked.begin(), ranked.end(), 0);
  std::stable_sort(ranked.begin(), ranked.end(), [&](int32_t a, int32_t b) { return tokens[a] > tokens[b]; });
  Tensor packed = torch::stable::empty({count}, ScalarType::Long);
  Tensor bin_starts = torch::stable::empty({plan.num_bins + 1}, ScalarType::Long);
  auto* out = static_cast<int64_t*>(packed.mutable_data_ptr());
  auto* starts = static_cast<int64_t*>(bin_starts.mutable_data_ptr());
  std::vector<int64_t> next(plan.num_bins);
  starts[0] = 0;
  for (int64_t rank = 0; rank < plan.num_bins; ++rank) {
    next[ranked[rank]] = starts[rank];
    starts[rank + 1] = starts[rank] + sequences[ranked[rank]];
  }
  for (int64_t at = 0; at < count; ++at) out[next[plan.bins[at]]++] = order[at];
  return {packed, bin_starts};
}

void require_integers(const Tensor& tensor, const char* name, int64_t length) {
  require(
      tensor.scalar_type() == ScalarType::Long && tensor.dim() == 1 && tensor.is_contiguous() && tensor.numel() == length, name,
      " must be a contiguous int64 vector of ", length);
}

// Where each segment's tokens and completion tokens begin; raises where the segments do not cover the completions in order.
std::vector<std::pair<int64_t, int64_t>> segment_offsets(
    const int64_t* prompts, const int64_t* sizes, const int64_t* starts, int64_t num_segments, int64_t num_completions) {
  std::vector<std::pair<int64_t, int64_t>> offsets{{0, 0}};
  offsets.reserve(num_segments + 1);
  require(starts[0] == 0 && starts[num_segments] == num_completions, "segment_starts must go from 0 to ", num_completions);
  for (int64_t segment = 0; segment < num_segments; ++segment) {
    require(starts[segment] <= starts[segment + 1] && starts[segment + 1] <= num_completions, "segment_starts must ascend");
    require(prompts[segment] >= 1 && prompts[segment] <= INT32_MAX, "prompts[", segment, "]=", prompts[segment], "; each must be at least 1");
    auto [tokens, rows] = offsets.back();
    tokens += prompts[segment];
    for (int64_t at = starts[segment]; at < starts[segment + 1]; ++at) {
      require(sizes[at] >= 1 && sizes[at] <= INT32_MAX, "sizes[", at, "]=", sizes[at], "; each must be at least 1");
      tokens += sizes[at];
      rows += sizes[at];
    }
    require(tokens <= INT32_MAX, "more than 2^31 - 1 tokens; cu_seqlens is int32");
    offsets.emplace_back(tokens, rows);
  }
  return offsets;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> packed_index(Tensor prompts, Tensor sizes, Tensor completions, Tensor segment_starts) {
  const int64_t num_segments = prompts.numel(), num_completions = sizes.numel();
  require_integers(prompts, "prompts", num_segments);
  require_integers(sizes, "sizes", num_completions);
  require_integers(completions, "completions", num_completions);
  require_integers(segment_starts, "segment_starts", num_segments + 1);
  const auto* prompt = static_cast<const int64_t*>(prompts.const_data_ptr());
  const auto* size = static_cast<const int64_t*>(sizes.const_data_ptr());
  const auto* completion = static_cast<const int64_t*>(completions.const_data_ptr());
  const auto* starts = static_cast<const int64_t*>(segment_starts.const_data_ptr());
  const auto offsets = segment_offsets(prompt, size, starts, num_segments, num_completions);
  const auto [num_tokens, num_rows] = offsets.back();
  Tensor cu_seqlens = torch::stable::empty({num_segments + 1}, ScalarType::Int);
  Tensor positions = torch::stable::empty({num_tokens}, ScalarType::Long);
  Tensor row_index = torch::stable::empty({num_rows}, ScalarType::Long);
  Tensor sequence_index = torch::stable::empty({num_rows}, ScalarType::Long);
  auto* ends = static_cast<int32_t*>(cu_seqlens.mutable_data_ptr());
  auto* position = static_cast<int64_t*>(positions.mutable_data_ptr());
  auto* row = static_cast<int64_t*>(row_index.mutable_data_ptr());
  auto* owner = static_cast<int64_t*>(sequence_index.mutable_data_ptr());
  ends[0] = 0;
  torch::stable::parallel_for(0, num_segments, 64, [&](int64_t first, int64_t last) {
    for (int64_t segment = first; segment < last; ++segment) {
      auto [token, out] = offsets[segment];
      std::iota(position + token, position + token + prompt[segment], int64_t{0});
      token += prompt[segment];
      const int64_t prompt_end = token - 1;
      for (int64_t at = starts[segment]; at < starts[segment + 1]; ++at) {
        std::iota(position + token, position + token + size[at], prompt[segment]);
        row[out] = prompt_end;
        std::iota(row + out + 1, row + out + size[at], token);
        std::fill(owner + out, owner + out + size[at], completion[at]);
        token += size[at];
        out += size[at];
      }
      ends[segment + 1] = static_cast<int32_t>(token);
    }
  });
  return {cu_seqlens, positions, row_index, sequence_index};
}

}  // namespace
}  // namespace grpo_fast

STABLE_TORCH_LIBRARY_IMPL(grpo_fast, CPU, library) {
  library.impl("pack_sequences", TORCH_BOX(&grpo_fast::pack_sequences));
  library.impl("packed_index", TORCH_BOX(&grpo_fast::packed_index));
}
