// libopapi.so: every aclnnXxxGetWorkspaceSize and aclnnXxx that the wheel names leads here, through
// the generated trampolines. Nothing is computed but what opapi_compute.cpp knows; each launch can
// be recorded with the arguments that torch_npu's host code passed.
#include <sys/mman.h>
#include <unistd.h>

#include <cctype>
#include <cmath>
#include <mutex>
#include <string>

#include "opapi_objects.h"

using namespace npusim;

namespace {

constexpr int kNumRegisters = 6;
constexpr int kNumFloatRegisters = 8;
constexpr int kMaxStackWords = 64;

// Between the two calls that make one launch.
struct Prepared {
    std::string description;
    Task computation;
};
thread_local Prepared prepared;

std::mutex &mutex = *new std::mutex;
std::string &record = *new std::string;
bool recording = false;

bool is_mapped(uint64_t word)
{
    static const uint64_t page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
    unsigned char resident;
    auto start = reinterpret_cast<void *>(word & ~(page - 1));
    return word >= page && mincore(start, page, &resident) == 0;
}

// An address of eight zero bytes, as &workspace_size and &executor are before the call.
bool points_to_zero(uint64_t word)
{
    if (word % 8 || find_object(word) || !is_mapped(word)) return false;
    return *reinterpret_cast<uint64_t *>(word) == 0;
}

std::string text_at(uint64_t word)
{
    std::string text;
    if (!is_mapped(word)) return text;
    for (auto *letter = reinterpret_cast<const unsigned char *>(word); *letter; letter++) {
        if (!std::isalnum(*letter) && *letter != '_') return "";
        if (text.size() == 32) return "";
        text += static_cast<char>(*letter);
    }
    return text;
}

// As JSON: an object or a text in quotes, anything else as the integer it is.
std::string describe_word(uint64_t word)
{
    if (const Object *object = find_object(word)) return '"' + describe(*object) + '"';
    std::string text = text_at(word);
    if (!text.empty()) return "\"'" + text + "'\"";
    return std::to_string(static_cast<int64_t>(word));
}

// The signature is not known, but every one ends in `uint64_t *workspace_size, executor **`.
std::string describe_arguments(const uint64_t *registers, const uint64_t *stack)
{
    auto word = [&](int n) { return n < kNumRegisters ? registers[n] : stack[n - kNumRegisters]; };
    std::string joined;
    for (int n = 0; n < kNumRegisters + kMaxStackWords; n++) {
        if (points_to_zero(word(n)) && points_to_zero(word(n + 1))) break;
        joined += (joined.empty() ? "" : ", ") + describe_word(word(n));
    }
    return joined;
}

std::string describe_doubles(const double *values)
{
    Object array{Kind::floats};
    for (int n = 0; n < kNumFloatRegisters; n++) {
        // What lies in an unused register need not be a number that JSON can hold.
        array.floats.push_back(std::isfinite(values[n]) ? values[n] : 0);
    }
    return describe(array);
}

void prepare(const std::string &op, const uint64_t *registers, const double *doubles,
             const uint64_t *stack)
{
    prepared = {{}, computation_of(op, registers)};
    if (!recording) return;
    prepared.description = "{\"op\": \"" + op + "\", \"arguments\": [" +
                           describe_arguments(registers, stack) + "], \"doubles\": " +
                           describe_doubles(doubles) + "}\n";
}

void launch_prepared(aclrtStream stream)
{
    Prepared ready = std::move(prepared);
    prepared = {};
    if (ready.computation) launch(stream, std::move(ready.computation));
    std::lock_guard<std::mutex> guard(mutex);
    if (recording) record += ready.description;
}

}  // namespace

// Called by the trampolines: `name` is the symbol, the rest are all arguments it may have.
extern "C" long npusim_opapi_called(const char *name, const uint64_t *registers,
                                    const double *doubles, const uint64_t *stack)
{
    static const std::string suffix = "GetWorkspaceSize";
    std::string op = name;
    if (op.size() > suffix.size() &&
        op.compare(op.size() - suffix.size(), suffix.size(), suffix) == 0) {
        prepare(op.substr(0, op.size() - suffix.size()), registers, doubles, stack);
    } else {
        // aclnnXxx(workspace, workspace_size, executor, stream)
        launch_prepared(reinterpret_cast<aclrtStream>(registers[3]));
    }
    return 0;
}

EXPORT void npusim_record_start(void)
{
    std::lock_guard<std::mutex> guard(mutex);
    record.clear();
    recording = true;
}

// One JSON object per line; valid until the next start.
EXPORT const char *npusim_record_stop(void)
{
    std::lock_guard<std::mutex> guard(mutex);
    recording = false;
    return record.c_str();
}
