// What all files of bindings share: checks of tensors, the stream, errors of a launch. Shapes and dtypes are checked by
// the Python operators; what is checked here again is what would otherwise read or write out of bounds.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "cuda/sparse_decode.h"

// Weak: a CPU-only torch does not have it, and this library must load there too. It is called with CUDA tensors only.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace rk::cuda::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline rk::cuda::RowType row_type(const Tensor& rows, const char* name) {
  switch (rows.scalar_type()) {
    case ScalarType::Float:
      return rk::cuda::RowType::kFloat32;
    case ScalarType::BFloat16:
      return rk::cuda::RowType::kBFloat16;
    case ScalarType::Half:
      return rk::cuda::RowType::kFloat16;
    default:
      break;
  }
  STD_TORCH_CHECK(false, "refusal_kernels_cuda: ", name, " must be float32, bfloat16 or float16");
}

inline void check(const Tensor& t, const char* name, const Tensor& like, std::optional<ScalarType> dtype) {
  STD_TORCH_CHECK(t.is_contiguous(), "refusal_kernels_cuda: ", name, " must be contiguous");
  STD_TORCH_CHECK(
      t.get_device_index() == like.get_device_index() && t.is_cuda(), "refusal_kernels_cuda: ", name,
      " must be on the device of the other tensors");
  if (dtype) STD_TORCH_CHECK(t.scalar_type() == *dtype, "refusal_kernels_cuda: ", name, " has the wrong dtype");
}

inline void* current_stream(const Tensor& on) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "refusal_kernels_cuda: this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  return stream;
}

inline void check_launch(const char* error, const char* kernel) {
  STD_TORCH_CHECK(error == nullptr, "refusal_kernels_cuda: ", kernel, ": ", error);
}

}  // namespace rk::cuda::bindings
