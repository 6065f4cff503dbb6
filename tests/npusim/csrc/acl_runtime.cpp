// The part of the ACL runtime that torch_npu calls, on host memory. There are no kernels here.
// Compiled against the headers inside the torch_npu wheel, so every prototype is checked.
//
// TORCH_NPU_SIM_SOC      name of the chip (Ascend910B2)
// TORCH_NPU_SIM_DEVICES  number of devices (1)
// TORCH_NPU_SIM_POISON   when set, fresh memory is 0xff: NaN in fp16, bf16 and fp32
#include <cstdlib>
#include <cstring>

#include "acl/acl.h"
#include "acl/acl_mdl.h"
#include "acl/acl_op_compiler.h"
#include "acl/acl_rt.h"
#include "streams.h"

using namespace npusim;

namespace {

constexpr aclError kBadParameter = 107000;
constexpr aclError kBadDevice = 107001;
constexpr aclError kOutOfMemory = 207018;
constexpr size_t kAlignment = 512;
constexpr size_t kSlack = 32;  // aclrtMalloc promises 32 bytes after what was asked for
constexpr size_t kTotalMemory = size_t{64} << 30;
constexpr int64_t kNumCores = 24;

// Contexts are only ever compared and handed back: the device's number, kept from being null.
constexpr intptr_t kContextBase = 0x1000;
thread_local int current_device = 0;

const char *setting(const char *name, const char *otherwise)
{
    const char *value = std::getenv(name);
    return value ? value : otherwise;
}

int num_devices() { return std::atoi(setting("TORCH_NPU_SIM_DEVICES", "1")); }

aclError allocate(void **memory, size_t size)
{
    if (posix_memalign(memory, kAlignment, size + kSlack)) return kOutOfMemory;
    if (std::getenv("TORCH_NPU_SIM_POISON")) std::memset(*memory, 0xff, size + kSlack);
    return ACL_SUCCESS;
}

aclError copy(void *target, size_t capacity, const void *source, size_t size)
{
    if (size > capacity) return kBadParameter;
    std::memmove(target, source, size);
    return ACL_SUCCESS;
}

template <typename T>
aclError answer(T *place, T value)
{
    *place = value;
    return ACL_SUCCESS;
}

}  // namespace

// ---- devices and contexts

EXPORT aclError aclrtGetDeviceCount(uint32_t *count)
{
    return answer<uint32_t>(count, num_devices());
}

EXPORT aclError aclrtSetDevice(int32_t device)
{
    if (device < 0 || device >= num_devices()) return kBadDevice;
    current_device = device;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtGetDevice(int32_t *device) { return answer(device, current_device); }

EXPORT aclError aclrtGetCurrentContext(aclrtContext *context)
{
    return answer(context, reinterpret_cast<aclrtContext>(kContextBase + current_device));
}

EXPORT aclError aclrtSetCurrentContext(aclrtContext context)
{
    current_device = static_cast<int>(reinterpret_cast<intptr_t>(context) - kContextBase);
    return ACL_SUCCESS;
}

EXPORT aclError aclrtGetPrimaryCtxState(int32_t, uint32_t *flags, int32_t *active)
{
    if (flags) *flags = 0;
    return answer(active, 1);
}

EXPORT const char *aclrtGetSocName(void) { return setting("TORCH_NPU_SIM_SOC", "Ascend910B2"); }

EXPORT const char *aclGetRecentErrMsg(void) { return "simulated device: not a real NPU"; }

EXPORT aclError aclsysGetCANNVersion(aclCANNPackageName, aclCANNPackageVersion *version)
{
    std::memset(version, 0, sizeof *version);
    std::strcpy(version->version, "8.5.0");
    return ACL_SUCCESS;
}

// ---- memory

EXPORT aclError aclrtMalloc(void **memory, size_t size, aclrtMemMallocPolicy)
{
    return allocate(memory, size);
}

EXPORT aclError aclrtMallocAlign32(void **memory, size_t size, aclrtMemMallocPolicy)
{
    return allocate(memory, size);
}

EXPORT aclError aclrtMallocHost(void **memory, size_t size) { return allocate(memory, size); }

EXPORT aclError aclrtFree(void *memory)
{
    free_after_streams(memory);
    return ACL_SUCCESS;
}

EXPORT aclError aclrtFreeHost(void *memory) { return aclrtFree(memory); }

EXPORT aclError aclrtGetMemInfo(aclrtMemAttr, size_t *free, size_t *total)
{
    *free = kTotalMemory;
    return answer(total, kTotalMemory);
}

EXPORT aclError aclrtMemcpy(void *target, size_t capacity, const void *source, size_t size,
                            aclrtMemcpyKind)
{
    return copy(target, capacity, source, size);
}

EXPORT aclError aclrtMemcpyAsync(void *target, size_t capacity, const void *source, size_t size,
                                 aclrtMemcpyKind, aclrtStream stream)
{
    aclError error = drain(stream);
    return error ? error : copy(target, capacity, source, size);
}

EXPORT aclError aclrtMemset(void *memory, size_t, int32_t value, size_t size)
{
    std::memset(memory, value, size);
    return ACL_SUCCESS;
}

EXPORT aclError aclrtMemsetAsync(void *memory, size_t, int32_t value, size_t size,
                                 aclrtStream stream)
{
    aclError error = drain(stream);
    std::memset(memory, value, size);
    return error;
}

// ---- what a device is asked about itself

EXPORT aclError aclrtDeviceCanAccessPeer(int32_t *can, int32_t, int32_t) { return answer(can, 1); }

EXPORT aclError aclGetDeviceCapability(uint32_t, aclDeviceInfo, int64_t *value)
{
    return answer(value, kNumCores);
}

EXPORT aclError aclrtGetSysParamOpt(aclSysParamOpt, int64_t *value)
{
    return answer<int64_t>(value, 0);
}

EXPORT aclError aclrtGetStreamOverflowSwitch(aclrtStream, uint32_t *flag)
{
    return answer<uint32_t>(flag, 0);
}

EXPORT size_t aclGetCompileoptSize(aclCompileOpt) { return 256; }

EXPORT aclError aclGetCompileopt(aclCompileOpt option, char *value, size_t size)
{
    std::strncpy(value, option == ACL_OP_JIT_COMPILE ? "disable" : "1", size);
    return ACL_SUCCESS;
}

EXPORT aclError aclrtLaunchCallback(aclrtCallback callback, void *data, aclrtCallbackBlockType,
                                    aclrtStream stream)
{
    launch(stream, [callback, data] {
        callback(data);
        return 0;
    });
    return ACL_SUCCESS;
}

// ---- accepted, with nothing to do

#define ACCEPTS(name, ...) EXPORT aclError name(__VA_ARGS__) { return ACL_SUCCESS; }

ACCEPTS(aclInit, const char *)
ACCEPTS(aclFinalize, void)
ACCEPTS(aclSetCompileopt, aclCompileOpt, const char *)
ACCEPTS(aclmdlFinalizeDump, void)
ACCEPTS(aclmdlInitDump, void)
ACCEPTS(aclmdlSetDump, const char *)
ACCEPTS(aclrtCtxSetSysParamOpt, aclSysParamOpt, int64_t)
ACCEPTS(aclrtDeviceEnablePeerAccess, int32_t, uint32_t)
ACCEPTS(aclrtGetLastError, aclrtLastErrLevel)
ACCEPTS(aclrtPeekAtLastError, aclrtLastErrLevel)
ACCEPTS(aclrtProcessReport, int32_t)
ACCEPTS(aclrtResetDevice, int32_t)
ACCEPTS(aclrtSetDeviceSatMode, aclrtFloatOverflowMode)
ACCEPTS(aclrtSetOpExecuteTimeOut, uint32_t)
ACCEPTS(aclrtSetOpWaitTimeout, uint32_t)
ACCEPTS(aclrtSetStreamFailureMode, aclrtStream, uint64_t)
ACCEPTS(aclrtSetStreamOverflowSwitch, aclrtStream, uint32_t)
ACCEPTS(aclrtSetSysParamOpt, aclSysParamOpt, int64_t)

EXPORT void aclAppLog(aclLogLevel, const char *, const char *, uint32_t, const char *, ...) {}
