// TVM-FFI: gdn_decode(projected, conv, state, slots, conv_weight, a_log, dt_bias, norm_weight, out, eps,
//                     units_per_block, launch_with_pdl)
//          gdn_decode_ahead(the same, first, second), two tensors or None to be fetched into the L2 cache
//
// On TVM-FFI's current stream; conv and state change in place, out is written; nothing is allocated.

#include "gdn_decode.cuh"
#include "host.cuh"

namespace crossfuse::gdn {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <int kUnits>
void start(const Launch& how, const Params& params) {
  auto kernel = params.dk <= 32 ? decode<2, kUnits> : params.dk <= 64 ? decode<4, kUnits> : decode<8, kUnits>;
  launch(how, kernel, params);
}

using Some = tvm::ffi::Optional<TensorView>;

void run_ahead(TensorView projected, TensorView conv, TensorView state, TensorView slots,
               TensorView conv_weight, TensorView a_log, TensorView dt_bias, TensorView norm_weight,
               TensorView out, double eps, int64_t units_per_block, bool launch_with_pdl, Some first_ahead,
               Some second_ahead) {
  check_dense(state, "state", {-1, -1, -1, -1});
  check_dense(conv, "conv", {state.size(0), -1, -1});
  const int64_t B = projected.size(0), HV = state.size(1), dk = state.size(2), dv = state.size(3);
  const int64_t C = conv.size(1), value = HV * dv;
  const int64_t H = (C - value) / (2 * dk);
  if (H < 1 || 2 * H * dk + value != C || HV % H != 0 || dk % 8 != 0 || dv % 8 != 0 || dk > kMaxKeyDim ||
      dv > kMaxValueDim || conv.size(2) != kTaps - 1) {
    TVM_FFI_THROW(ValueError)
        << "conv and state must be [slots, 2 H dk + HV dv, 3] and [slots, HV, dk, dv] with HV"
           " a multiple of H, and dk, dv multiples of 8 up to 128 and 256; got ["
        << conv.size(0) << ", " << C << ", " << conv.size(2) << "] and [" << state.size(0) << ", " << HV
        << ", " << dk << ", " << dv << "]";
  }
  check_rows(projected, "projected", {-1, C + value + 2 * HV});
  if (slots.ndim() != 1 || slots.size(0) != B)
    TVM_FFI_THROW(ValueError) << "slots must have one element a row";
  check_dense(conv_weight, "conv_weight", {C, kTaps});
  check_dense(a_log, "a_log", {HV});
  check_dense(dt_bias, "dt_bias", {HV});
  check_dense(norm_weight, "norm_weight", {dv});
  check_dense(out, "out", {B, value});
  check_dtype(projected, "projected", kBFloat16);
  check_dtype(conv, "conv", kBFloat16);
  check_dtype(state, "state", kFloat32);
  check_index(slots, "slots");
  check_dtype(conv_weight, "conv_weight", kBFloat16);
  check_dtype(a_log, "a_log", kFloat32);
  check_dtype(dt_bias, "dt_bias", kFloat32);
  check_dtype(norm_weight, "norm_weight", kBFloat16);
  check_dtype(out, "out", kBFloat16);
  check_devices({projected, conv, state, slots, conv_weight, a_log, dt_bias, norm_weight, out});

  const int64_t group = HV / H, units = group * divide_up(dv, kUnitColumns);
  if (units > kMaxClusterUnits) {
    TVM_FFI_THROW(ValueError) << "HV / H * ceil(dv / 32) must be at most " << kMaxClusterUnits << ", got "
                              << units;
  }
  int64_t per_block = units_per_block;
  while (per_block > 0 && divide_up(units, per_block) > 8) per_block *= 2;
  if (per_block != 1 && per_block != 2 && per_block != kMaxUnits) {
    TVM_FFI_THROW(ValueError) << "units_per_block must be 1, 2 or 4, got " << units_per_block;
  }
  if (B == 0) return;

  const Params params{data<bf16>(projected), projected.stride(0),     data<bf16>(conv),
                      data<float>(state),    slots.data_ptr(),        is(slots, kInt64),
                      slots.stride(0),       data<bf16>(conv_weight), data<float>(a_log),
                      data<float>(dt_bias),  data<bf16>(norm_weight), data<bf16>(out),
                      static_cast<int>(H),   static_cast<int>(HV),    static_cast<int>(dk),
                      static_cast<int>(dv),  static_cast<float>(eps),
                      {ahead_of<Ahead>(first_ahead, projected), ahead_of<Ahead>(second_ahead, projected)}};
  const unsigned cluster = static_cast<unsigned>(divide_up(units, per_block));
  tvm::ffi::CUDADeviceGuard guard(projected.device().device_id);
  const Launch how{dim3(cluster * static_cast<unsigned>(H), static_cast<unsigned>(B)),
                   dim3(static_cast<unsigned>(per_block) * kUnitThreads), current_stream(projected),
                   launch_with_pdl, cluster};
  auto begin = per_block == 1 ? start<1> : per_block == 2 ? start<2> : start<4>;
  begin(how, params);
}

void run(TensorView projected, TensorView conv, TensorView state, TensorView slots, TensorView conv_weight,
         TensorView a_log, TensorView dt_bias, TensorView norm_weight, TensorView out, double eps,
         int64_t units_per_block, bool launch_with_pdl) {
  run_ahead(projected, conv, state, slots, conv_weight, a_log, dt_bias, norm_weight, out, eps,
            units_per_block, launch_with_pdl, {}, {});
}

}  // namespace crossfuse::gdn

TVM_FFI_DLL_EXPORT_TYPED_FUNC(gdn_decode, crossfuse::gdn::run);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gdn_decode_ahead, crossfuse::gdn::run_ahead);
