// Python's view of oneCCL. Buffers are passed by address, as torch gives it: an operation outlives
// the call, and dqrm/comm/ccl.py, which checks shapes and dtypes, keeps the tensors until its end.
#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "engine.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace dqrm {
namespace {

using GroupPointer = std::shared_ptr<Group>;
using OperationPointer = std::shared_ptr<Operation>;
using Counts = std::vector<size_t>;

void* at(uintptr_t address) { return reinterpret_cast<void*>(address); }

OperationPointer submit(const GroupPointer& group, Operation::Post post, double seconds) {
  const nb::gil_scoped_release release;
  return Engine::instance().submit(group, std::move(post), seconds);
}

ccl::datatype dtype_of(int number) { return static_cast<ccl::datatype>(number); }
ccl::reduction reduction_of(int number) { return static_cast<ccl::reduction>(number); }

void require_counts(const GroupPointer& group, const Counts& counts) {
  if (int64_t(counts.size()) != group->communicator.size()) {
    throw std::invalid_argument("counts: one a rank");
  }
}

OperationPointer allreduce(const GroupPointer& group, uintptr_t send, uintptr_t receive,
                           size_t count, int dtype, int reduction, double seconds) {
  return submit(group, [=](const ccl::communicator& communicator) {
    return ccl::allreduce(at(send), at(receive), count, dtype_of(dtype), reduction_of(reduction),
                          communicator);
  }, seconds);
}

OperationPointer reduce(const GroupPointer& group, uintptr_t send, uintptr_t receive, size_t count,
                        int dtype, int reduction, int root, double seconds) {
  return submit(group, [=](const ccl::communicator& communicator) {
    return ccl::reduce(at(send), at(receive), count, dtype_of(dtype), reduction_of(reduction),
                       root, communicator);
  }, seconds);
}

OperationPointer reduce_scatter(const GroupPointer& group, uintptr_t send, uintptr_t receive,
                                size_t count, int dtype, int reduction, double seconds) {
  return submit(group, [=](const ccl::communicator& communicator) {
    return ccl::reduce_scatter(at(send), at(receive), count, dtype_of(dtype),
                               reduction_of(reduction), communicator);
  }, seconds);
}

OperationPointer broadcast(const GroupPointer& group, uintptr_t buffer, size_t bytes, int root,
                           double seconds) {
  return submit(group, [=](const ccl::communicator& communicator) {
    return ccl::broadcast(at(buffer), bytes, ccl::datatype::uint8, root, communicator);
  }, seconds);
}

OperationPointer allgatherv(const GroupPointer& group, uintptr_t send, uintptr_t receive,
                            const Counts& bytes, double seconds) {
  require_counts(group, bytes);
  const size_t own = bytes[size_t(group->communicator.rank())];
  return submit(group, [=](const ccl::communicator& communicator) {
    return ccl::allgatherv(at(send), own, at(receive), bytes, ccl::datatype::uint8, communicator);
  }, seconds);
}

OperationPointer alltoallv(const GroupPointer& group, uintptr_t send, const Counts& send_bytes,
                           uintptr_t receive, const Counts& receive_bytes, double seconds) {
  require_counts(group, send_bytes);
  require_counts(group, receive_bytes);
  return submit(group, [=](const ccl::communicator& communicator) {
    return ccl::alltoallv(at(send), send_bytes, at(receive), receive_bytes, ccl::datatype::uint8,
                          communicator);
  }, seconds);
}

OperationPointer send(const GroupPointer& group, uintptr_t buffer, size_t bytes, int peer,
                      double seconds) {
  return submit(group, [=](const ccl::communicator& communicator) {
    return ccl::send(at(buffer), bytes, ccl::datatype::uint8, peer, communicator);
  }, seconds);
}

OperationPointer receive(const GroupPointer& group, uintptr_t buffer, size_t bytes, int peer,
                         double seconds) {
  return submit(group, [=](const ccl::communicator& communicator) {
    return ccl::recv(at(buffer), bytes, ccl::datatype::uint8, peer, communicator);
  }, seconds);
}

nb::dict dtypes() {
  using Type = ccl::datatype;
  nb::dict names;
  const std::pair<const char*, Type> known[] = {
      {"int8", Type::int8},       {"uint8", Type::uint8},     {"int16", Type::int16},
      {"uint16", Type::uint16},   {"int32", Type::int32},     {"uint32", Type::uint32},
      {"int64", Type::int64},     {"uint64", Type::uint64},   {"float16", Type::float16},
      {"float32", Type::float32}, {"float64", Type::float64}, {"bfloat16", Type::bfloat16}};
  for (const auto& [name, type] : known) names[name] = static_cast<int>(type);
  return names;
}

nb::dict reductions() {
  nb::dict names;
  names["sum"] = static_cast<int>(ccl::reduction::sum);
  names["product"] = static_cast<int>(ccl::reduction::prod);
  names["min"] = static_cast<int>(ccl::reduction::min);
  names["max"] = static_cast<int>(ccl::reduction::max);
  return names;
}

std::string version() {
  const ccl::library_version found = ccl::get_library_version();
  return std::to_string(found.major) + "." + std::to_string(found.minor) + "." +
         std::to_string(found.update);
}

}  // namespace
}  // namespace dqrm

NB_MODULE(_ccl, module) {
  using namespace dqrm;
  module.doc() = "oneCCL; use dqrm.comm.ccl.";
  // Groups and operations that failed are held on to for good.
  nb::set_leak_warnings(false);

  nb::class_<Group>(module, "Group").def_prop_ro("dead", [](const Group& group) {
    return group.dead.load();
  });
  nb::class_<Operation>(module, "Operation")
      .def_ro("number", &Operation::number)
      .def_prop_ro("finished", &Operation::finished)
      .def_prop_ro("succeeded", [](const Operation& self) { return self.current() == State::done; })
      .def_prop_ro("timed_out",
                   [](const Operation& self) { return self.current() == State::timed_out; })
      .def_prop_ro("error", [](const Operation& self) {
        return self.finished() ? self.error : std::string();
      })
      .def("wait", [](Operation& self, double seconds) {
        const nb::gil_scoped_release release;
        return Engine::instance().wait(self, seconds);
      }, "seconds"_a);

  module.attr("DTYPES") = dtypes();
  module.attr("REDUCTIONS") = reductions();
  module.def("version", &version);
  module.def("open_address", [] {
    const std::string address = [] {
      const nb::gil_scoped_release release;
      return Engine::instance().open_address();
    }();
    return nb::bytes(address.data(), address.size());
  });
  module.def("join", [](const nb::bytes& address, int size, int rank, double seconds) {
    const std::string text(address.c_str(), address.size());
    const nb::gil_scoped_release release;
    return Engine::instance().join(text, size, rank, seconds);
  }, "address"_a, "size"_a, "rank"_a, "seconds"_a);
  module.def("allreduce", &allreduce);
  module.def("reduce", &reduce);
  module.def("reduce_scatter", &reduce_scatter);
  module.def("broadcast", &broadcast);
  module.def("allgatherv", &allgatherv);
  module.def("alltoallv", &alltoallv);
  module.def("send", &send);
  module.def("receive", &receive);
  module.def("attend", [] {
    const nb::gil_scoped_release release;
    Engine::instance().attend();
  });
  module.def("watch", [](const OperationPointer& operation) {
    return Engine::instance().watch(operation);
  });
  module.def("next_finished", [] {
    const nb::gil_scoped_release release;
    return Engine::instance().next_finished();
  });
  module.def("fail", [](Group& group, const std::string& reason) {
    const nb::gil_scoped_release release;
    Engine::instance().fail(group, reason);
  });
  module.def("stop", [] {
    const nb::gil_scoped_release release;
    Engine::instance().stop();
  });
}
