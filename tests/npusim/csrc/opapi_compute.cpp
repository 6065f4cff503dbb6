// ProcessGroupHCCL and DDP's reducer call a few aclnn operators from C++, where the Python
// dispatch mode does not see them. These are computed, on the stream they are launched on.
#include <cstring>
#include <functional>
#include <utility>

#include "opapi_objects.h"

namespace npusim {
namespace {

using Index = std::vector<int64_t>;

// A value of any dtype; integers stay exact.
struct Number {
    double real = 0;
    int64_t integer = 0;
    bool is_real = false;

    static Number of(double value) { return {value, static_cast<int64_t>(value), true}; }
    static Number of(int64_t value) { return {static_cast<double>(value), value, false}; }
};

size_t size_of(aclDataType dtype)
{
    switch (dtype) {
        case ACL_INT8: case ACL_UINT8: case ACL_BOOL: return 1;
        case ACL_FLOAT16: case ACL_BF16: case ACL_INT16: case ACL_UINT16: return 2;
        case ACL_FLOAT: case ACL_INT32: case ACL_UINT32: return 4;
        default: return 8;
    }
}

template <typename T>
T read(const char *place)
{
    T value;
    std::memcpy(&value, place, sizeof value);
    return value;
}

template <typename T>
void write(char *place, T value)
{
    std::memcpy(place, &value, sizeof value);
}

float from_bf16(uint16_t bits)
{
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

// Rounds to nearest, ties to even; NaN stays NaN.
uint16_t to_bf16(float value)
{
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

Number load(const char *place, aclDataType dtype)
{
    auto integer = [](int64_t value) { return Number::of(value); };
    switch (dtype) {
        case ACL_FLOAT: return Number::of(static_cast<double>(read<float>(place)));
        case ACL_FLOAT16: return Number::of(static_cast<double>(read<_Float16>(place)));
        case ACL_BF16: return Number::of(static_cast<double>(from_bf16(read<uint16_t>(place))));
        case ACL_DOUBLE: return Number::of(read<double>(place));
        case ACL_INT8: return integer(read<int8_t>(place));
        case ACL_UINT8: return integer(read<uint8_t>(place));
        case ACL_INT16: return integer(read<int16_t>(place));
        case ACL_UINT16: return integer(read<uint16_t>(place));
        case ACL_INT32: return integer(read<int32_t>(place));
        case ACL_UINT32: return integer(read<uint32_t>(place));
        case ACL_BOOL: return integer(read<uint8_t>(place) != 0);
        default: return integer(read<int64_t>(place));
    }
}

void store(char *place, aclDataType dtype, Number value)
{
    switch (dtype) {
        case ACL_FLOAT: write(place, static_cast<float>(value.real)); break;
        case ACL_FLOAT16: write(place, static_cast<_Float16>(value.real)); break;
        case ACL_BF16: write(place, to_bf16(static_cast<float>(value.real))); break;
        case ACL_DOUBLE: write(place, value.real); break;
        case ACL_BOOL: write<uint8_t>(place, value.real != 0); break;
        case ACL_INT8: case ACL_UINT8: write(place, static_cast<uint8_t>(value.integer)); break;
        case ACL_INT16: case ACL_UINT16: write(place, static_cast<uint16_t>(value.integer)); break;
        case ACL_INT32: case ACL_UINT32: write(place, static_cast<uint32_t>(value.integer)); break;
        default: write(place, value.integer); break;
    }
}

char *address(const Object &tensor, const Index &index)
{
    int64_t element = tensor.offset;
    for (size_t dim = 0; dim < index.size(); dim++) element += index[dim] * tensor.strides[dim];
    return tensor.data + element * static_cast<int64_t>(size_of(tensor.dtype));
}

Number at(const Object &tensor, const Index &index)
{
    return load(address(tensor, index), tensor.dtype);
}

// Sets every element of `target` to `value(index)`.
void fill(const Object &target, const std::function<Number(const Index &)> &value)
{
    int64_t total = 1;
    for (int64_t size : target.shape) total *= size;
    Index index(target.shape.size(), 0);
    for (int64_t done = 0; done < total; done++) {
        store(address(target, index), target.dtype, value(index));
        for (size_t dim = index.size(); dim-- > 0;) {
            if (++index[dim] < target.shape[dim]) break;
            index[dim] = 0;
        }
    }
}

Number broadcast_at(const Object &source, const Index &index)
{
    Index own(index.end() - static_cast<int64_t>(source.shape.size()), index.end());
    for (size_t dim = 0; dim < own.size(); dim++) {
        if (source.shape[dim] == 1) own[dim] = 0;
    }
    return at(source, own);
}

Number value_of(const Object &scalar)
{
    bool is_real = scalar.dtype == ACL_FLOAT || scalar.dtype == ACL_DOUBLE;
    return is_real ? Number::of(scalar.real) : Number::of(scalar.integer);
}

void copy(const Object &target, const Object &source)
{
    fill(target, [&](const Index &index) { return broadcast_at(source, index); });
}

void scale(const Object &target, const Object &source, double factor)
{
    fill(target, [&](const Index &index) { return Number::of(at(source, index).real * factor); });
}

// Divides rather than multiplies by 1 / divisor: the two round differently.
void divide(const Object &target, const Object &source, double divisor)
{
    fill(target, [&](const Index &index) { return Number::of(at(source, index).real / divisor); });
}

void concatenate(const Object &target, const Object &list, int64_t dim)
{
    if (dim < 0) dim += static_cast<int64_t>(target.shape.size());
    Object part = target;
    for (const Object *item : list.items) {
        if (item->shape.size() != target.shape.size()) continue;  // torch allows an empty [0]
        part.shape = item->shape;
        copy(part, *item);
        part.offset += item->shape[dim] * target.strides[dim];
    }
}

// `padding` has a pair (before, after) per dimension, the last dimension first.
void pad(const Object &target, const Object &source, const Object &padding, Number value)
{
    fill(target, [&](const Index &index) {
        Index inner = index;
        for (size_t dim = 0; dim < inner.size(); dim++) {
            size_t pair = 2 * (inner.size() - 1 - dim);
            if (pair < padding.integers.size()) inner[dim] -= padding.integers[pair];
            if (inner[dim] < 0 || inner[dim] >= source.shape[dim]) return value;
        }
        return at(source, inner);
    });
}

}  // namespace

Task computation_of(const std::string &op, const uint64_t *words)
{
    // torch_npu destroys its objects after the launch, which on a stream may be before the work.
    auto object = [&](int position) { return *find_object(words[position]); };
    auto task = [](auto work) {
        return [work] {
            work();
            return 0;
        };
    };
    if (op == "aclnnInplaceCopy") {
        return task([to = object(0), from = object(1)] { copy(to, from); });
    }
    if (op == "aclnnCast") {
        return task([from = object(0), to = object(2)] { copy(to, from); });
    }
    if (op == "aclnnInplaceMuls") {
        return task([x = object(0), by = object(1).real] { scale(x, x, by); });
    }
    if (op == "aclnnMuls") {
        return task([from = object(0), by = object(1).real, to = object(2)] {
            scale(to, from, by);
        });
    }
    if (op == "aclnnInplaceDivs") {
        return task([x = object(0), by = object(1).real] { divide(x, x, by); });
    }
    if (op == "aclnnDivs") {
        return task([from = object(0), by = object(1).real, to = object(2)] {
            divide(to, from, by);
        });
    }
    if (op == "aclnnInplaceOne" || op == "aclnnInplaceZero") {
        auto value = Number::of(int64_t{op == "aclnnInplaceOne"});
        return task([x = object(0), value] { fill(x, [&](const Index &) { return value; }); });
    }
    if (op == "aclnnInplaceFillScalar") {
        auto value = value_of(object(1));
        return task([x = object(0), value] { fill(x, [&](const Index &) { return value; }); });
    }
    if (op == "aclnnConstantPadNd") {
        auto value = value_of(object(2));
        return task([from = object(0), padding = object(1), value, to = object(3)] {
            pad(to, from, padding, value);
        });
    }
    if (op == "aclnnCat") {
        // A list points to its items, which do not live as long as the copy of the list.
        std::vector<Object> items;
        for (const Object *item : object(0).items) items.push_back(*item);
        auto dim = static_cast<int64_t>(words[1]);
        return task([items, dim, to = object(2)] {
            Object list{Kind::tensor_list};
            for (const Object &item : items) list.items.push_back(&item);
            concatenate(to, list, dim);
        });
    }
    return {};
}

}  // namespace npusim
