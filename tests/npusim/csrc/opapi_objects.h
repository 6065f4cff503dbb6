// What torch_npu hands to an aclnn operator: the objects it made with aclCreateTensor and so on.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "streams.h"

namespace npusim {

enum class Kind { tensor, tensor_list, integers, booleans, floats, scalar, scalar_list };

struct Object {
    explicit Object(Kind kind) : kind(kind) {}

    Kind kind;
    aclDataType dtype = ACL_DT_UNDEFINED;
    // Of a tensor: in elements, and where its memory is.
    std::vector<int64_t> shape;
    std::vector<int64_t> strides;
    int64_t offset = 0;
    char *data = nullptr;
    // Of an array or a list.
    std::vector<int64_t> integers;
    std::vector<double> floats;
    std::vector<const Object *> items;
    // Of a scalar.
    double real = 0;
    int64_t integer = 0;
};

// The live object at this address, or null: an argument word can be anything.
const Object *find_object(uint64_t word);

// Whether its numbers lie one after the other, in order.
bool is_contiguous(const Object &tensor);

// As in "f32[3,4]", "f32[3,4] strided", "[1,2]" or "0.5".
std::string describe(const Object &object);

// Does what the operator means, for the few that torch_npu's own C++ calls below the Python
// dispatcher. `words` are the arguments of its GetWorkspaceSize; the result is empty for others.
Task computation_of(const std::string &op, const uint64_t *words);

}  // namespace npusim
