// SPDX-License-Identifier: Apache-2.0
// Launches every kernel of csrc/kernels on small odd shapes and checks what it computes, for
// compute-sanitizer: without PyTorch and cuBLAS there is nothing else to instrument.
//
// Usage: main [--unpoisoned] [split] [merge] [lists] [factor] [eigen] [narrow]
#include <cxxabi.h>

#include <cstring>
#include <set>

#include "check.h"

namespace {

std::set<std::string>& launched() {
  static std::set<std::string> names;
  return names;
}

}  // namespace

// The linker sends each launch here (--wrap), so that what is printed is what ran.
extern "C" cudaError_t __real_cudaLaunchKernel(const void*, dim3, dim3, void**, size_t,
                                               cudaStream_t);
extern "C" cudaError_t __wrap_cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block,
                                               void** arguments, size_t shared,
                                               cudaStream_t stream) {
  const cudaError_t status =
      __real_cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
  const char* name = nullptr;
  if (status == cudaSuccess && cudaFuncGetName(&name, kernel) == cudaSuccess) {
    launched().insert(name);
  }
  return status;
}

int main(int count, char** arguments) {
  using namespace lorax::check;
  const struct {
    const char* name;
    void (*run)();
  } families[] = {{"split", check_split},   {"merge", check_merge}, {"lists", check_lists},
                  {"factor", check_factor}, {"eigen", check_eigen}, {"narrow", check_narrow}};
  std::set<std::string> asked(arguments + 1, arguments + count);
  is_poisoned = asked.erase("--unpoisoned") == 0;
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  for (const auto& family : families) {
    if (!asked.empty() && asked.count(family.name) == 0) continue;
    const int before = passed;
    family.run();
    std::printf("%s: %d checks\n", family.name, passed - before);
  }
  for (const std::string& mangled : launched()) {
    int status = 0;
    char* name = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status);
    std::printf("launched %s\n", status == 0 ? name : mangled.c_str());
    std::free(name);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  LORAX_RUN(cudaDeviceReset());
  return failed == 0 && passed > 0 ? 0 : 1;
}
