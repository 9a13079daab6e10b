// Runs the kernels that share memory within a block, over arrays without a byte to spare, for sanitizers; with an argument also
// one that has a race.
#include <cuda_runtime.h>

#include "weight_delta.cuh"
#include "weight_pack.cuh"

using namespace grpo_fast;

__global__ void neighbours_without_a_barrier(int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = values[(threadIdx.x + 32) % 64];
}

static void pack(Format format, int32_t rank) {
  constexpr int kRows = 11, kColumns = 1500;
  std::vector<float> weight(kRows * kColumns, 0.5f), a(rank * kColumns, 0.25f), b(kRows * rank, 2.0f);
  std::vector<char> bucket(slot_bytes(format, kRows, kRows * kColumns));
  Table table{};
  table.num_slots = 1;
  table.slots[0] = {weight.data(), a.data(), b.data(), bucket.data(), kRows * kColumns, kColumns, 0, rank, 0.5f,
                    static_cast<uint8_t>(format), 1, 1, 0};
  cuda_on_host::launch(pack_weights_kernel<false>, 4, kPackThreads)(table);
}

static void delta() {
  constexpr int64_t kCount = 3 * kDeltaTile - 5, kTiles = 3;
  std::vector<uint16_t> before(kCount, 1), after(kCount, 1), bits(kTiles * kDeltaThreads), values(kCount);
  std::vector<int32_t> starts(kTiles), indices(kCount);
  std::vector<uint64_t> sums(kTiles), totals(2);
  for (int64_t at = 0; at < kCount; at += 3) after[at] = 2;
  cuda_on_host::launch(compare_kernel<uint16_t, false>, kTiles, kDeltaThreads)(
      before.data(), after.data(), kCount, bits.data(), starts.data(), sums.data());
  cuda_on_host::launch(add_up_kernel, 1, kScanThreads)(starts.data(), sums.data(), kTiles, totals.data());
  cuda_on_host::launch(write_kernel<uint16_t>, kTiles, kDeltaThreads)(
      after.data(), bits.data(), starts.data(), indices.data(), values.data());
  if (totals[0] != (kCount + 2) / 3) cuda_on_host::fail("found another number of changes");
}

// More tiles than a block has threads, several times over, and some.
static void add_up() {
  constexpr int64_t kTiles = 3 * kScanThreads + 7;
  std::vector<int32_t> counts(kTiles), starts;
  std::vector<uint64_t> sums(kTiles), totals(2);
  int32_t all = 0;
  uint64_t checksum = 0;
  for (int64_t tile = 0; tile < kTiles; ++tile) {
    counts[tile] = static_cast<int32_t>(tile % 7);
    sums[tile] = static_cast<uint64_t>(tile) << 50;
    starts.push_back(all);
    all += counts[tile];
    checksum += sums[tile];
  }
  cuda_on_host::launch(add_up_kernel, 1, kScanThreads)(counts.data(), sums.data(), kTiles, totals.data());
  if (counts != starts) cuda_on_host::fail("a tile starts elsewhere");
  if (totals[0] != static_cast<uint64_t>(all) || totals[1] != checksum) cuda_on_host::fail("added up to another number");
}

int main(int arguments, char**) {
  pack(kFloat8E4M3, 70);
  pack(kBFloat16, 70);
  delta();
  add_up();
  if (arguments > 1) {
    std::vector<int> out(64);
    cuda_on_host::launch(neighbours_without_a_barrier, 1, 64)(out.data());
  }
}
