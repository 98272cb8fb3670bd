// TVM-FFI: pair_allreduce(partial, residual, weight, out_residual, out_normed, buffers, state, rank, max_tokens, eps,
// weight_bias)
//
// residual may be None (then the result is the sum), and so may weight and out_normed (then nothing is normed). buffers
// is int64 [2], both ranks' memory as this one reaches it; state is int32 [2], zeros before the first call. Both live on
// the device and belong to these two ranks. On TVM-FFI's current stream; nothing is allocated. A call waits for the
// peer's.
//
// pair_allreduce_choices(parts, experts, num_experts, residual, weight, out_residual, out_normed, buffers, state, rank,
// max_tokens, eps, weight_bias): the same of a sum whose part on this rank is, for token t, that of the rows t K + k of
// parts [T K, D], over those k whose int32 experts [T, K] are in 0..num_experts-1.
//
// pair_or(flashinfer, buffers, state, rank, max_tokens, most_tokens) -> a function with the parameters of `flashinfer`,
// which is FlashInfer's trtllm_allreduce_fusion: up to `most_tokens` it is that one, above it is this one.

#include "host.cuh"
#include "pair_allreduce.cuh"

namespace crossfuse::pair_allreduce {

using Some = tvm::ffi::Optional<TensorView>;
using tvm::ffi::Function, tvm::ffi::Tensor;

template <typename T>
T* data_or_null(const Some& x) {
  return x.has_value() ? data<T>(x.value()) : nullptr;
}

// What both functions do: the checks that they share, and the launch. `params` has what is theirs alone.
template <bool kOfChoices>
void reduce_rows(Params params, TensorView partial, Some residual, Some weight, TensorView out_residual,
                 Some out_normed, TensorView buffers, TensorView state, int64_t rank, int64_t max_tokens, double eps,
                 double weight_bias) {
  const int64_t T = out_residual.size(0), D = out_residual.size(1);
  check_dense(buffers, "buffers", {2});
  check_dense(state, "state", {2});
  check_dtype(buffers, "buffers", kInt64);
  check_dtype(state, "state", kInt32);
  check_devices({partial, out_residual, buffers, state});
  check_dtype(partial, "partial", kBFloat16);
  for (const Some& rows : {residual, Some(out_residual), out_normed}) {
    if (!rows.has_value()) continue;
    check_dense(rows.value(), "residual, out_residual and out_normed", {T, D});
    check_dtype(rows.value(), "residual, out_residual and out_normed", kBFloat16);
    check_devices({partial, rows.value()});
  }
  if (weight.has_value() != out_normed.has_value()) {
    TVM_FFI_THROW(ValueError) << "weight and out_normed come together or not at all";
  }
  if (weight.has_value()) {
    check_dense(weight.value(), "weight", {D});
    check_dtype(weight.value(), "weight", kBFloat16);
    check_devices({partial, weight.value()});
  }
  if (D % 8 != 0 || D > kMaxDim || D == 0) {
    TVM_FFI_THROW(ValueError) << "the hidden size must be a multiple of 8 up to " << kMaxDim << ", got " << D;
  }
  if (rank != 0 && rank != 1) TVM_FFI_THROW(ValueError) << "rank must be 0 or 1, got " << rank;
  if (max_tokens % kPlainRows != 0 || T > max_tokens) {
    TVM_FFI_THROW(ValueError) << "max_tokens must be a multiple of " << kPlainRows << " and at least the " << T
                              << " tokens of this call, got " << max_tokens;
  }
  if (T == 0) return;

  params.partial = data<bf16>(partial);
  params.residual = data_or_null<bf16>(residual);
  params.weight = data_or_null<bf16>(weight);
  params.out_residual = data<bf16>(out_residual);
  params.out_normed = data_or_null<bf16>(out_normed);
  params.buffers = data<int64_t>(buffers);
  params.state = data<State>(state);
  params.rank = static_cast<int>(rank);
  params.T = static_cast<int>(T);
  params.D = static_cast<int>(D);
  params.max_tokens = static_cast<int>(max_tokens);
  params.eps = static_cast<float>(eps);
  params.weight_bias = static_cast<float>(weight_bias);
  tvm::ffi::CUDADeviceGuard guard(partial.device().device_id);
  const int threads = static_cast<int>((D / 8 + kWarp - 1) / kWarp) * kWarp;
  const auto kernel =
      D <= kUsualDims ? reduce<kUsualDims / 8, kOfChoices> : reduce<kMaxWarps * kWarp, kOfChoices>;
  int blocks = 0;  // all of them run at once: none waits for one that cannot start
  TVM_FFI_CHECK_CUDA_ERROR(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0));
  blocks *= num_multiprocessors(partial);
  constexpr int kRows = kOfChoices ? kChoiceRows : kPlainRows;
  const int64_t chunks = (T + kRows - 1) / kRows;
  const unsigned grid = static_cast<unsigned>(chunks < blocks ? chunks : blocks);
  launch({dim3(grid), dim3(static_cast<unsigned>(threads)), current_stream(partial), /*overlap=*/false}, kernel,
         params);
}

void run(TensorView partial, Some residual, Some weight, TensorView out_residual, Some out_normed, TensorView buffers,
         TensorView state, int64_t rank, int64_t max_tokens, double eps, double weight_bias) {
  check_dense(out_residual, "out_residual", {-1, -1});
  check_dense(partial, "partial", {out_residual.size(0), out_residual.size(1)});
  reduce_rows<false>({}, partial, residual, weight, out_residual, out_normed, buffers, state, rank, max_tokens, eps,
                     weight_bias);
}

void run_choices(TensorView parts, TensorView experts, int64_t num_experts, Some residual, Some weight,
                 TensorView out_residual, Some out_normed, TensorView buffers, TensorView state, int64_t rank,
                 int64_t max_tokens, double eps, double weight_bias) {
  check_dense(out_residual, "out_residual", {-1, -1});
  check_dense(experts, "experts", {out_residual.size(0), -1});
  check_dtype(experts, "experts", kInt32);
  check_devices({parts, experts});
  const int64_t K = experts.size(1);
  if (K < 1 || K > kMaxChoices) {
    TVM_FFI_THROW(ValueError) << "a token has 1 to " << kMaxChoices << " choices, got " << K;
  }
  check_dense(parts, "parts", {experts.size(0) * K, out_residual.size(1)});
  Params params{};
  params.experts = data<int32_t>(experts);
  params.K = static_cast<int>(K);
  params.N = static_cast<int>(num_experts);
  reduce_rows<true>(params, parts, residual, weight, out_residual, out_normed, buffers, state, rank, max_tokens, eps,
                    weight_bias);
}

// The places of what is needed here among FlashInfer's parameters (0.7.2), and its codes of the two patterns.
constexpr int kPartial = 0, kTokens = 3, kPattern = 10, kSum = 11, kResidual = 12, kOutResidual = 13, kOutNormed = 14;
constexpr int kWeight = 17, kEps = 18, kWeightBias = 22, kParameters = 23;
constexpr int64_t kAllReduce = 0, kAllReduceResidualNorm = 1;

Function pair_or(Function flashinfer, Tensor buffers, Tensor state, int64_t rank, int64_t max_tokens,
                 int64_t most_tokens) {
  return Function::FromPacked([=](tvm::ffi::PackedArgs args, tvm::ffi::Any* result) {
    if (args.size() != kParameters) {
      TVM_FFI_THROW(TypeError) << "FlashInfer's kernel takes " << kParameters << " parameters, got " << args.size();
    }
    if (args[kTokens].cast<int64_t>() <= most_tokens) {
      flashinfer.CallPacked(args, result);
      return;
    }
    const TensorView partial = args[kPartial].cast<TensorView>();
    const int64_t pattern = args[kPattern].cast<int64_t>();
    if (pattern == kAllReduce) {
      run(partial, std::nullopt, std::nullopt, args[kSum].cast<TensorView>(), std::nullopt, buffers, state, rank,
          max_tokens, 0.0, 0.0);
    } else if (pattern == kAllReduceResidualNorm) {
      run(partial, args[kResidual].cast<TensorView>(), args[kWeight].cast<TensorView>(),
          args[kOutResidual].cast<TensorView>(), args[kOutNormed].cast<TensorView>(), buffers, state, rank, max_tokens,
          args[kEps].cast<double>(), args[kWeightBias].cast<double>());
    } else {
      TVM_FFI_THROW(ValueError) << "pattern " << pattern << " takes at most " << most_tokens << " tokens, got "
                                << partial.size(0);
    }
  });
}

}  // namespace crossfuse::pair_allreduce

TVM_FFI_DLL_EXPORT_TYPED_FUNC(pair_allreduce, crossfuse::pair_allreduce::run);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(pair_allreduce_choices, crossfuse::pair_allreduce::run_choices);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(pair_or, crossfuse::pair_allreduce::pair_or);
