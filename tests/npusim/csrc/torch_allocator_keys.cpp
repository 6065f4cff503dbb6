// torch and torch_npu each register the names of their allocator's settings. Where torch is a CUDA
// build two of them are the same, and the exception about it ends the process. This function is
// preloaded (env.py), comes before torch's own, and forgets the two names, so that torch_npu may
// register them.
#include <dlfcn.h>

#include <string>
#include <unordered_set>

namespace c10::CachingAllocator {

struct __attribute__((visibility("default"))) AcceleratorAllocatorConfig {
    using Keys = std::unordered_set<std::string>;
    static Keys &getMutableKeys();
};

AcceleratorAllocatorConfig::Keys &AcceleratorAllocatorConfig::getMutableKeys()
{
    const char *name =
        "_ZN3c1016CachingAllocator26AcceleratorAllocatorConfig14getMutableKeysB5cxx11Ev";
    void *own = dlsym(dlopen("libc10.so", RTLD_LAZY | RTLD_NOLOAD), name);
    Keys &keys = reinterpret_cast<Keys &(*)()>(own)();
    keys.erase("per_process_memory_fraction");
    keys.erase("pinned_reserve_segment_size_mb");
    return keys;
}

}  // namespace c10::CachingAllocator
