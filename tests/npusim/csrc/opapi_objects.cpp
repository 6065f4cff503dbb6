#include "opapi_objects.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_map>

namespace npusim {
namespace {

std::mutex &mutex = *new std::mutex;
std::unordered_map<uint64_t, Object *> &live = *new std::unordered_map<uint64_t, Object *>;

void *keep(Object object)
{
    auto *kept = new Object(std::move(object));
    std::lock_guard<std::mutex> guard(mutex);
    live[reinterpret_cast<uint64_t>(kept)] = kept;
    return kept;
}

int forget(const void *object)
{
    std::lock_guard<std::mutex> guard(mutex);
    auto found = live.find(reinterpret_cast<uint64_t>(object));
    if (found == live.end()) return 0;
    delete found->second;
    live.erase(found);
    return 0;
}

template <typename T>
T read(const void *place)
{
    T value;
    std::memcpy(&value, place, sizeof value);
    return value;
}

std::string dtype_name(aclDataType dtype)
{
    switch (dtype) {
        case ACL_FLOAT: return "f32";
        case ACL_FLOAT16: return "f16";
        case ACL_BF16: return "bf16";
        case ACL_DOUBLE: return "f64";
        case ACL_INT8: return "i8";
        case ACL_INT16: return "i16";
        case ACL_INT32: return "i32";
        case ACL_INT64: return "i64";
        case ACL_UINT8: return "u8";
        case ACL_BOOL: return "bool";
        default: return "dtype" + std::to_string(dtype);
    }
}

std::string number(double value)
{
    char text[32];
    std::snprintf(text, sizeof text, "%.9g", value);
    return text;
}

template <typename T, typename F>
std::string listed(const std::vector<T> &values, F text)
{
    std::string joined;
    for (const T &value : values) joined += (joined.empty() ? "" : ",") + text(value);
    return "[" + joined + "]";
}

}  // namespace

const Object *find_object(uint64_t word)
{
    std::lock_guard<std::mutex> guard(mutex);
    auto found = live.find(word);
    return found == live.end() ? nullptr : found->second;
}

bool is_contiguous(const Object &tensor)
{
    int64_t expected = 1;
    for (size_t dim = tensor.shape.size(); dim-- > 0;) {
        if (tensor.shape[dim] == 0) return true;
        if (dim < tensor.strides.size() && tensor.shape[dim] != 1 &&
            tensor.strides[dim] != expected)
            return false;
        expected *= tensor.shape[dim];
    }
    return true;
}

std::string describe(const Object &object)
{
    auto integer = [](int64_t value) { return std::to_string(value); };
    switch (object.kind) {
        case Kind::tensor:
            return dtype_name(object.dtype) + listed(object.shape, integer) +
                   (is_contiguous(object) ? "" : " strided");
        case Kind::scalar: return number(object.real);
        case Kind::floats: return listed(object.floats, number);
        case Kind::integers:
        case Kind::booleans: return listed(object.integers, integer);
        default: return listed(object.items, [](const Object *item) { return describe(*item); });
    }
}

}  // namespace npusim

using namespace npusim;

EXPORT void *aclCreateTensor(const int64_t *shape, uint64_t num_dims, aclDataType dtype,
                             const int64_t *strides, int64_t offset, int /* format */,
                             const int64_t * /* storage shape */, uint64_t, void *data)
{
    Object tensor{Kind::tensor};
    tensor.dtype = dtype;
    tensor.shape.assign(shape, shape + num_dims);
    if (strides) tensor.strides.assign(strides, strides + num_dims);
    tensor.offset = offset;
    tensor.data = static_cast<char *>(data);
    return keep(std::move(tensor));
}

EXPORT void *aclCreateIntArray(const int64_t *values, uint64_t size)
{
    Object array{Kind::integers};
    array.integers.assign(values, values + size);
    return keep(std::move(array));
}

EXPORT void *aclCreateBoolArray(const bool *values, uint64_t size)
{
    Object array{Kind::booleans};
    array.integers.assign(values, values + size);
    return keep(std::move(array));
}

EXPORT void *aclCreateFloatArray(const float *values, uint64_t size)
{
    Object array{Kind::floats};
    array.floats.assign(values, values + size);
    return keep(std::move(array));
}

EXPORT void *aclCreateTensorList(const Object *const *items, uint64_t size)
{
    Object list{Kind::tensor_list};
    list.items.assign(items, items + size);
    return keep(std::move(list));
}

EXPORT void *aclCreateScalarList(const Object *const *items, uint64_t size)
{
    Object list{Kind::scalar_list};
    list.items.assign(items, items + size);
    return keep(std::move(list));
}

EXPORT void *aclCreateScalar(void *value, aclDataType dtype)
{
    Object scalar{Kind::scalar};
    scalar.dtype = dtype;
    switch (dtype) {
        case ACL_FLOAT: scalar.real = read<float>(value); break;
        case ACL_DOUBLE: scalar.real = read<double>(value); break;
        case ACL_INT64: scalar.real = scalar.integer = read<int64_t>(value); break;
        case ACL_INT32: scalar.real = scalar.integer = read<int32_t>(value); break;
        case ACL_BOOL: scalar.real = scalar.integer = read<bool>(value); break;
        default: break;
    }
    return keep(std::move(scalar));
}

EXPORT int aclDestroyTensor(const void *object) { return forget(object); }
EXPORT int aclDestroyScalar(const void *object) { return forget(object); }
EXPORT int aclDestroyIntArray(const void *object) { return forget(object); }
EXPORT int aclDestroyBoolArray(const void *object) { return forget(object); }
EXPORT int aclDestroyFloatArray(const void *object) { return forget(object); }
EXPORT int aclDestroyAclOpExecutor(void *) { return 0; }

// As in CANN, a list owns its items.
EXPORT int aclDestroyTensorList(const Object *list)
{
    for (const Object *item : list->items) forget(item);
    return forget(list);
}

EXPORT int aclDestroyScalarList(const Object *list)
{
    for (const Object *item : list->items) forget(item);
    return forget(list);
}

// The caller frees the array.
EXPORT int aclGetViewShape(const Object *tensor, int64_t **shape, uint64_t *num_dims)
{
    size_t bytes = tensor->shape.size() * sizeof(int64_t);
    *num_dims = tensor->shape.size();
    *shape = static_cast<int64_t *>(std::malloc(bytes + 1));
    std::memcpy(*shape, tensor->shape.data(), bytes);
    return 0;
}
