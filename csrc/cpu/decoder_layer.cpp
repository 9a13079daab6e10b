// A token a row through one decoder layer on the host, see grpo_fast/ops/decoder_layer.py.
//
// What has the same input is multiplied together: four products, one attention and the gate, each shared out among torch's
// threads; a norm is too little to be. Keys and values of a prompt are read by its completions one after the other.
#include "few_rows.h"

#ifdef GRPO_HAS_AVX512
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "../require.h"

namespace grpo_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kWorkOfThread = 1 << 16;  // multiplications that are worth waking one

struct Linear {
  const float *weight, *bias;
  int64_t num_outputs;
  float* out;  // [num_rows, num_outputs]
  int64_t rank = 0;
  const float *lora_a = nullptr, *lora_b = nullptr;  // [rank, num_inputs] and [num_outputs, rank]
  float* narrowed = nullptr;                         // [num_rows, rank]
};

// Rows [num_rows, size] times several weights at once, and through their adapters.
void multiply_all(const float* rows, int64_t num_rows, int64_t size, bool adds, std::vector<Linear> linears) {
  thread_local Room room;
  int64_t ranks = 0;
  for (const Linear& linear : linears) ranks += linear.rank;
  if (ranks > 0) {
    float* narrowed = room.of(num_rows * ranks);
    std::vector<Linear> first;
    for (Linear& linear : linears) {
      linear.narrowed = narrowed;
      narrowed += num_rows * linear.rank;
      if (linear.rank > 0) first.push_back({linear.lora_a, nullptr, linear.rank, linear.narrowed});
    }
    multiply_all(rows, num_rows, size, false, std::move(first));
  }

  const auto tiles = [](const Linear& linear) { return (linear.num_outputs + kOutputs - 1) / kOutputs; };
  int64_t num_tiles = 0;
  for (const Linear& linear : linears) num_tiles += tiles(linear);
  const int64_t grain = kWorkOfThread / std::max<int64_t>(1, kOutputs * size * num_rows) + 1;
  torch::stable::parallel_for(0, num_tiles, grain, [&](int64_t begin, int64_t end) {
    for (const Linear& linear : linears) {
      const int64_t count = tiles(linear), first = std::clamp<int64_t>(begin, 0, count), last = std::clamp<int64_t>(end, 0, count);
      const int64_t from = first * kOutputs, until = std::min(last * kOutputs, linear.num_outputs);
      multiply(rows, num_rows, linear.weight, size, from, until, {linear.out, linear.num_outputs, linear.bias, adds});
      if (linear.rank > 0) {
        multiply(
            linear.narrowed, num_rows, linear.lora_b, linear.rank, from, until,
            {linear.out, linear.num_outputs, nullptr, true});
      }
      begin -= count;
      end -= count;
    }
  });
}

// Float32 of some shape, in order; the memory of it.
float* floats(const Tensor& tensor, std::initializer_list<int64_t> shape, const char* name) {
  require(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous(), name, " must be float32 and contiguous");
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
  for (int64_t axis = 0; fits && axis < tensor.dim(); ++axis) fits = tensor.size(axis) == shape.begin()[axis];
  if (!fits) {
    std::ostringstream sizes;
    for (const int64_t size : shape) sizes << (sizes.tellp() > 0 ? ", " : "") << size;
    require(false, name, " must be (", sizes.str(), ")");
  }
  return static_cast<float*>(tensor.mutable_data_ptr());
}

const int64_t* indices(const Tensor& tensor, int64_t count, int64_t limit, const char* name) {
  require(tensor.scalar_type() == ScalarType::Long && tensor.is_contiguous(), name, " must be int64 and contiguous");
  require(tensor.dim() == 1 && tensor.numel() == count, name, " must be a vector of ", count);
  const auto* values = static_cast<const int64_t*>(tensor.const_data_ptr());
  const bool fits = std::all_of(values, values + count, [&](int64_t value) { return value >= 0 && value < limit; });
  require(fits, name, " must lie in [0, ", limit, ")");
  return values;
}

struct Cache {
  const int64_t *source, *padding;
  int64_t width;  // of the prompts
  const float *prefix_keys, *prefix_values;
  int64_t capacity, position;
  float *keys, *values;
};

struct Attention {
  int64_t num_rows, num_heads, size, group;  // heads are those of keys and values; `group` queries stand at each
  float* queries;                            // [num_rows, num_heads * group * size], and what is mixed for them
  const float *keys, *values;                // [num_rows, num_heads * size]
  const float *query_norm, *key_norm;
  float query_epsilon, key_epsilon;
  const float *cos, *sin;
  float scale;
};

// Norm and rotation of one head's numbers, in place of `out`.
void turn(const Attention& a, int64_t row, const float* norm, float epsilon, const float* values, float* normed, float* out) {
  if (norm) rms_norm(values, norm, a.size, epsilon, normed);
  rotate(norm ? normed : values, a.cos + row * a.size, a.sin + row * a.size, a.size, out);
}

// Begins to read a row's own keys and values of one head: where they are short, nothing foretells the processor where they lie.
void fetch(const Attention& a, const Cache& cache, int64_t row, int64_t head) {
  constexpr int64_t kMost = 2048;
  const int64_t from = (row * a.num_heads + head) * cache.capacity * a.size, count = std::min(kMost, cache.position * a.size);
  for (int64_t at = from; at < from + count; at += kLanes) {
    __builtin_prefetch(cache.keys + at);
    __builtin_prefetch(cache.values + at);
  }
}

// One row's queries at one head of keys and values; its key and value are appended first.
void attend(const Attention& a, const Cache& cache, int64_t row, int64_t head, float* room) {
  const int64_t prompt = cache.source[row], skipped = cache.padding[prompt], seen = cache.width - skipped;
  const int64_t own = cache.position + 1, count = seen + own;
  float *turned = room, *normed = turned + a.group * a.size, *scores = normed + a.size;

  const int64_t place = row * a.num_heads + head, own_from = place * cache.capacity * a.size;
  float *own_keys = cache.keys + own_from, *own_values = cache.values + own_from;
  turn(a, row, a.key_norm, a.key_epsilon, a.keys + place * a.size, normed, own_keys + cache.position * a.size);
  std::copy_n(a.values + place * a.size, a.size, own_values + cache.position * a.size);
  float* queries = a.queries + place * a.group * a.size;
  for (int64_t query = 0; query < a.group; ++query) {
    float* to = turned + query * a.size;
    turn(a, row, a.query_norm, a.query_epsilon, queries + query * a.size, normed, to);
    for (int64_t i = 0; i < a.size; ++i) to[i] *= a.scale;
  }

  const int64_t prefix_from = ((prompt * a.num_heads + head) * cache.width + skipped) * a.size;
  multiply(turned, a.group, cache.prefix_keys + prefix_from, a.size, 0, seen, Target{scores, count, nullptr, false});
  multiply(turned, a.group, own_keys, a.size, 0, own, Target{scores + seen, count, nullptr, false});
  for (int64_t query = 0; query < a.group; ++query) softmax(scores + query * count, count);
  mix(a.group, scores, count, seen, cache.prefix_values + prefix_from, a.size, queries, false);
  mix(a.group, scores + seen, count, own, own_values, a.size, queries, true);
}

void attend(const Attention& a, const Cache& cache) {
  const int64_t longest = cache.width + cache.position + 1;
  const int64_t grain = kWorkOfThread / (2 * a.group * a.size * longest) + 1;
  torch::stable::parallel_for(0, a.num_rows * a.num_heads, grain, [&](int64_t begin, int64_t end) {
    thread_local Room room;
    float* numbers = room.of(a.group * (a.size + longest) + a.size);
    for (int64_t at = begin; at < end; ++at) {
      if (at + 1 < end) fetch(a, cache, (at + 1) % a.num_rows, (at + 1) / a.num_rows);
      attend(a, cache, at % a.num_rows, at / a.num_rows, numbers);
    }
  });
}

// Weights of a layer, in the order of the schema, with the biases and adapters of those that have one.
class Weights {
 public:
  Weights(
      const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, const std::vector<Tensor>& lora_a,
      const std::vector<Tensor>& lora_b)
      : weights_(weights), biases_(biases), lora_a_(lora_a), lora_b_(lora_b) {
    require(weights.size() == 7 && biases.size() == 7, weights.size(), " weights and ", biases.size(), " biases; there must be 7");
    require(
        lora_a.size() == lora_b.size() && (lora_a.empty() || lora_a.size() == 7), lora_a.size(), " lora_a and ",
        lora_b.size(), " lora_b; there must be 7 or none");
  }

  int64_t outputs(int at) const { return weights_[at].size(0); }

  Linear to(int at, int64_t num_inputs, int64_t num_outputs, float* out) const {
    static constexpr const char* kNames[] = {"query", "key", "value", "output", "gate", "up", "down"};
    const float* bias = biases_[at].numel() ? floats(biases_[at], {num_outputs}, "a bias") : nullptr;
    Linear linear{floats(weights_[at], {num_outputs, num_inputs}, kNames[at]), bias, num_outputs, out};
    if (!lora_a_.empty() && lora_a_[at].numel()) {
      require(lora_a_[at].dim() == 2, "lora_a must be a matrix");
      linear.rank = lora_a_[at].size(0);
      linear.lora_a = floats(lora_a_[at], {linear.rank, num_inputs}, "lora_a");
      linear.lora_b = floats(lora_b_[at], {num_outputs, linear.rank}, "lora_b");
    }
    return linear;
  }

 private:
  const std::vector<Tensor>&weights_, &biases_, &lora_a_, &lora_b_;
};

void norm_rows(const float* rows, int64_t num_rows, int64_t size, const float* weight, float epsilon, float* out) {
  for (int64_t row = 0; row < num_rows; ++row) rms_norm(rows + row * size, weight, size, epsilon, out + row * size);
}

void decoder_layer(
    Tensor hidden, std::vector<Tensor> norms, std::vector<double> epsilons, std::vector<Tensor> weights,
    std::vector<Tensor> biases, std::vector<Tensor> lora_a, std::vector<Tensor> lora_b, Tensor cos, Tensor sin,
    Tensor source, Tensor padding, Tensor prefix_keys, Tensor prefix_values, Tensor keys, Tensor values, int64_t position,
    double scale) {
  require(hidden.dim() == 2 && cos.dim() == 2 && keys.dim() == 4 && prefix_keys.dim() == 4, "a tensor has too few dimensions");
  require((norms.size() == 2 || norms.size() == 4) && epsilons.size() == norms.size(), "norms and epsilons must be 2 or 4");
  const Weights layer(weights, biases, lora_a, lora_b);
  const int64_t num_rows = hidden.size(0), width = hidden.size(1), size = cos.size(1), num_heads = keys.size(1);
  const int64_t num_prompts = prefix_keys.size(0), prompt_width = prefix_keys.size(2), capacity = keys.size(2);
  require(size > 0 && size % 2 == 0 && num_heads > 0, num_heads, " heads of keys with ", size, " numbers; there must be some, an even number each");
  const int64_t num_queries = layer.outputs(0) / size, inner = layer.outputs(4);
  require(num_queries > 0 && num_queries % num_heads == 0, num_queries, " heads of ", size, " over ", num_heads, " of keys");
  require(keys.size(0) >= num_rows && position >= 0 && position < capacity, "no room at ", position, " of ", capacity);
  const std::initializer_list<int64_t> prompts{num_prompts, num_heads, prompt_width, size};
  const std::initializer_list<int64_t> completions{keys.size(0), num_heads, capacity, size};
  const Cache cache{
      indices(source, num_rows, num_prompts, "source"), indices(padding, num_prompts, prompt_width + 1, "padding"),
      prompt_width, floats(prefix_keys, prompts, "prefix_keys"), floats(prefix_values, prompts, "prefix_values"),
      capacity, position, floats(keys, completions, "keys"), floats(values, completions, "values")};
  const auto norm = [&](size_t at, int64_t of) { return at < norms.size() ? floats(norms[at], {of}, "a norm") : nullptr; };
  const auto epsilon = [&](size_t at) { return at < epsilons.size() ? static_cast<float>(epsilons[at]) : 0.0f; };

  const int64_t of_queries = num_queries * size, of_keys = num_heads * size;
  thread_local Room room;
  float* normed = room.of(num_rows * (width + std::max(of_queries + 2 * of_keys, 2 * inner)));
  float *queries = normed + num_rows * width, *new_keys = queries + num_rows * of_queries;
  float *new_values = new_keys + num_rows * of_keys, *gate = queries, *up = gate + num_rows * inner;
  float* state = floats(hidden, {num_rows, width}, "hidden");
  const Linear to_queries = layer.to(0, width, of_queries, queries), to_keys = layer.to(1, width, of_keys, new_keys);
  const Linear to_values = layer.to(2, width, of_keys, new_values), from_heads = layer.to(3, of_queries, width, state);
  const Linear to_gate = layer.to(4, width, inner, gate), to_up = layer.to(5, width, inner, up);
  const Linear from_inner = layer.to(6, inner, width, state);
  const float *before_attention = norm(0, width), *before_mlp = norm(1, width);
  const Attention attention{
      num_rows, num_heads, size, num_queries / num_heads, queries, new_keys, new_values, norm(2, size), norm(3, size),
      epsilon(2), epsilon(3), floats(cos, {num_rows, size}, "cos"), floats(sin, {num_rows, size}, "sin"),
      static_cast<float>(scale)};
  if (num_rows == 0) return;

  norm_rows(state, num_rows, width, before_attention, epsilon(0), normed);
  multiply_all(normed, num_rows, width, false, {to_queries, to_keys, to_values});
  attend(attention, cache);
  multiply_all(queries, num_rows, of_queries, true, {from_heads});

  norm_rows(state, num_rows, width, before_mlp, epsilon(1), normed);
  multiply_all(normed, num_rows, width, false, {to_gate, to_up});
  torch::stable::parallel_for(0, num_rows * inner, kWorkOfThread / 16, [&](int64_t begin, int64_t end) {
    gated(gate + begin, up + begin, end - begin);
  });
  multiply_all(gate, num_rows, inner, true, {from_inner});
}

Tensor few_rows_product(Tensor rows, Tensor weight, std::optional<Tensor> bias) {
  require(rows.dim() == 2 && weight.dim() == 2, "rows and weight must be matrices");
  const int64_t num_rows = rows.size(0), size = rows.size(1), num_outputs = weight.size(0);
  const Tensor result = torch::stable::empty({num_rows, num_outputs}, ScalarType::Float);
  const Linear linear{
      floats(weight, {num_outputs, size}, "weight"), bias ? floats(*bias, {num_outputs}, "bias") : nullptr, num_outputs,
      floats(result, {num_rows, num_outputs}, "the result")};
  if (num_rows > 0) multiply_all(floats(rows, {num_rows, size}, "rows"), num_rows, size, false, {linear});
  return result;
}

}  // namespace
}  // namespace grpo_fast

STABLE_TORCH_LIBRARY_IMPL(grpo_fast, CPU, library) {
  if (!__builtin_cpu_supports("avx512f")) return;
  library.impl("decoder_layer", TORCH_BOX(&grpo_fast::decoder_layer));
  library.impl("few_rows_product", TORCH_BOX(&grpo_fast::few_rows_product));
}
#endif
