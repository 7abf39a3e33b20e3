// refusal_kernels._C: the host side that Python sees. No tensor passes through pybind11: the operators register
// themselves with torch's dispatcher when this library is loaded (csrc/cpu, csrc/cuda), through its stable C ABI.

#include <pybind11/pybind11.h>

#include <string>

#include "build_config.h"

namespace py = pybind11;

namespace {

// The newest instruction set of this processor among those the CPU kernels are compiled for.
const char* cpu_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return "avx512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
  return "default";
}

py::list split(const std::string& text, char separator) {
  py::list parts;
  for (size_t begin = 0; begin < text.size();) {
    size_t end = text.find(separator, begin);
    if (end == std::string::npos) end = text.size();
    parts.append(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

py::object text_or_none(const char* text) {
  return *text ? py::object(py::str(text)) : py::none();
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = RK_CXX_COMPILER;
  info["flags"] = RK_CXX_FLAGS;
  info["build_type"] = RK_BUILD_TYPE;
  info["torch"] = RK_TORCH_VERSION;
  info["torch_abi_target"] = "2.10";
  info["git_commit"] = text_or_none(RK_GIT_COMMIT);
  info["isa"] = cpu_isa();
#ifdef RK_WITH_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["cuda_version"] = text_or_none(RK_CUDA_VERSION);
  info["cuda_archs"] = split(RK_CUDA_ARCHITECTURES, ';');
  info["cuda_left_out"] = text_or_none(RK_CUDA_LEFT_OUT);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of refusal_kernels. Importing it registers torch.ops.refusal_kernels_*.";
  m.def("build_info", &build_info, "How this binary was built and what it holds, as plain values.");
}
