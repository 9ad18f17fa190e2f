// The extension module: every folder binds its own functions.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bench/bindings.h"
#include "common/levels.h"
#include "embedding/bindings.h"
#include "exchange/bindings.h"
#include "exchange/message_bindings.h"
#include "interaction/bindings.h"
#include "mlp/bindings.h"
#include "packed/bindings.h"
#include "text/bindings.h"

NB_MODULE(_native, module) {
  using namespace dqrm;
  module.doc() = "Compiled loops of dqrm.kernels; use the functions there.";
  // What compiled graphs hold on to lives until the process ends; that is no leak worth a word.
  nanobind::set_leak_warnings(false);
  module.def("available_levels", &available_levels);
  module.def("has_fast_avx512_bf16", &has_fast_avx512_bf16);
  module.def("has_avx512_vnni", &has_avx512_vnni);
  module.def("has_amx", &has_amx);
  bind_bench(module);
  bind_embedding(module);
  bind_exchange(module);
  bind_row_messages(module);
  bind_interaction(module);
  bind_int8(module);
  bind_mlp(module);
  bind_packed(module);
  bind_text(module);
}
