// The part of the ACL runtime whose types older releases of torch_npu do not have in their headers;
// build.py leaves this file out for them.
#include <cstring>

#include "acl/acl_rt.h"
#include "streams.h"

namespace {

constexpr int kNumCores = 24;

}  // namespace

EXPORT aclError aclrtPointerGetAttributes(const void *, aclrtPtrAttributes *attributes)
{
    std::memset(attributes, 0, sizeof *attributes);
    attributes->location.type = ACL_MEM_LOCATION_TYPE_UNREGISTERED;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtGetDeviceInfo(uint32_t, aclrtDevAttr, int64_t *value)
{
    *value = kNumCores;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtGetResInCurrentThread(aclrtDevResLimitType, uint32_t *value)
{
    *value = kNumCores;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtGetStreamResLimit(aclrtStream, aclrtDevResLimitType, uint32_t *value)
{
    *value = kNumCores;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtGetDeviceResLimit(int32_t, aclrtDevResLimitType, uint32_t *value)
{
    *value = kNumCores;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtSetStreamAttribute(aclrtStream, aclrtStreamAttr, aclrtStreamAttrValue *)
{
    return ACL_SUCCESS;
}
