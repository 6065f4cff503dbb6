#include <cstring>
#include <type_traits>

#include "hccl_communicator.h"

namespace npusim {
namespace {

struct BFloat16 {
    uint16_t bits;

    operator float() const
    {
        uint32_t wide = static_cast<uint32_t>(bits) << 16;
        float value;
        std::memcpy(&value, &wide, sizeof value);
        return value;
    }

    // Rounds to nearest, ties to even; NaN stays NaN.
    static BFloat16 of(float value)
    {
        uint32_t wide;
        std::memcpy(&wide, &value, sizeof wide);
        if (value != value) return {static_cast<uint16_t>((wide >> 16) | 0x40)};
        return {static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16)};
    }
};

template <typename T>
T combine(T a, T b, HcclReduceOp op)
{
    switch (op) {
        case HCCL_REDUCE_PROD: return a * b;
        case HCCL_REDUCE_MAX: return a != a || a > b ? a : b;  // NaN wins
        case HCCL_REDUCE_MIN: return a != a || a < b ? a : b;
        default: return a + b;
    }
}

template <typename T, typename Accumulator = T>
bool reduce_as(void *target, const std::vector<const void *> &sources, uint64_t count,
               HcclReduceOp op)
{
    auto value = [&](size_t rank, uint64_t i) {
        return static_cast<Accumulator>(static_cast<const T *>(sources[rank])[i]);
    };
    for (uint64_t i = 0; i < count; i++) {
        Accumulator total = value(0, i);
        for (size_t rank = 1; rank < sources.size(); rank++) {
            total = static_cast<Accumulator>(combine(total, value(rank, i), op));
        }
        if constexpr (std::is_same_v<T, BFloat16>) {
            static_cast<T *>(target)[i] = BFloat16::of(total);
        } else {
            static_cast<T *>(target)[i] = static_cast<T>(total);
        }
    }
    return true;
}

}  // namespace

uint64_t size_of(HcclDataType dtype)
{
    switch (dtype) {
        case HCCL_DATA_TYPE_INT16: case HCCL_DATA_TYPE_UINT16:
        case HCCL_DATA_TYPE_FP16: case HCCL_DATA_TYPE_BFP16: return 2;
        case HCCL_DATA_TYPE_INT32: case HCCL_DATA_TYPE_UINT32: case HCCL_DATA_TYPE_FP32: return 4;
        case HCCL_DATA_TYPE_INT64: case HCCL_DATA_TYPE_UINT64: case HCCL_DATA_TYPE_FP64: return 8;
        default: return 1;
    }
}

bool reduce(void *target, const std::vector<const void *> &sources, uint64_t count,
            HcclDataType dtype, HcclReduceOp op)
{
    switch (dtype) {
        case HCCL_DATA_TYPE_INT8: return reduce_as<int8_t>(target, sources, count, op);
        case HCCL_DATA_TYPE_INT16: return reduce_as<int16_t>(target, sources, count, op);
        case HCCL_DATA_TYPE_INT32: return reduce_as<int32_t>(target, sources, count, op);
        case HCCL_DATA_TYPE_INT64: return reduce_as<int64_t>(target, sources, count, op);
        case HCCL_DATA_TYPE_UINT8: return reduce_as<uint8_t>(target, sources, count, op);
        case HCCL_DATA_TYPE_UINT16: return reduce_as<uint16_t>(target, sources, count, op);
        case HCCL_DATA_TYPE_UINT32: return reduce_as<uint32_t>(target, sources, count, op);
        case HCCL_DATA_TYPE_UINT64: return reduce_as<uint64_t>(target, sources, count, op);
        case HCCL_DATA_TYPE_FP32: return reduce_as<float>(target, sources, count, op);
        case HCCL_DATA_TYPE_FP64: return reduce_as<double>(target, sources, count, op);
        case HCCL_DATA_TYPE_FP16: return reduce_as<_Float16, float>(target, sources, count, op);
        case HCCL_DATA_TYPE_BFP16: return reduce_as<BFloat16, float>(target, sources, count, op);
        default: return false;
    }
}

}  // namespace npusim
