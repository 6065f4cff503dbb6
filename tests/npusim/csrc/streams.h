// Simulated streams and events; defined in libascendcl, used by libopapi and libhccl too.
//
// A stream that never carried communication is immediate: its work is done before the call that
// launched it returns. The first communication on a stream gives it a thread, which runs what is
// enqueued in order. So a value read before `wait()` is an old one, as on a device.
#pragma once

#include <cstdint>
#include <functional>

#include "acl/acl_rt.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace npusim {

// Returns 0, or an error code that the stream then keeps.
using Task = std::function<int()>;

constexpr aclError kTimedOut = 107020;
constexpr aclError kStreamFailed = 507011;

// Runs `task` on the stream's thread, after all that was enqueued before it.
__attribute__((visibility("default"))) void enqueue(aclrtStream stream, Task task);

// Runs `task` on the stream's thread where it has one, else here and now.
__attribute__((visibility("default"))) void launch(aclrtStream stream, Task task);

// Frees host memory as soon as no stream can still be using it.
void free_after_streams(void *memory);

// Waits for all that was enqueued on the stream so far.
aclError drain(aclrtStream stream);

}  // namespace npusim
