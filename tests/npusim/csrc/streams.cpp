#include "streams.h"

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <list>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace npusim {
namespace {

constexpr int kForEver = -1;

class Stream {
public:
    explicit Stream(int id) : id(id) {}

    // Returns the ticket to wait for.
    uint64_t enqueue(Task task)
    {
        std::lock_guard<std::mutex> guard(mutex_);
        if (!threaded_) {
            threaded_ = true;
            std::thread(&Stream::run, this).detach();
        }
        tasks_.push_back(std::move(task));
        changed_.notify_all();
        return ++enqueued_;
    }

    bool threaded()
    {
        std::lock_guard<std::mutex> guard(mutex_);
        return threaded_;
    }

    uint64_t last_ticket()
    {
        std::lock_guard<std::mutex> guard(mutex_);
        return enqueued_;
    }

    bool reached(uint64_t ticket)
    {
        std::lock_guard<std::mutex> guard(mutex_);
        return done_ >= ticket;
    }

    aclError wait(uint64_t ticket, int milliseconds = kForEver)
    {
        std::unique_lock<std::mutex> lock(mutex_);
        auto passed = [&] { return done_ >= ticket; };
        if (milliseconds < 0) {
            changed_.wait(lock, passed);
        } else if (!changed_.wait_for(lock, std::chrono::milliseconds(milliseconds), passed)) {
            return kTimedOut;
        }
        return error_ ? kStreamFailed : ACL_SUCCESS;
    }

    const int id;

private:
    void run()
    {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            changed_.wait(lock, [&] { return !tasks_.empty(); });
            Task task = std::move(tasks_.front());
            tasks_.pop_front();
            lock.unlock();
            int error = task();
            lock.lock();
            done_++;
            if (error && !error_) error_ = error;
            changed_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<Task> tasks_;
    uint64_t enqueued_ = 0;
    uint64_t done_ = 0;
    int error_ = 0;
    bool threaded_ = false;
};

struct Event {
    std::chrono::steady_clock::time_point recorded_at;
    Stream *stream = nullptr;
    uint64_t ticket = 0;

    bool reached() const { return !stream || stream->reached(ticket); }
    aclError wait() const { return stream ? stream->wait(ticket) : ACL_SUCCESS; }
};

// A place in a stream that must be passed before memory is given back.
using Mark = std::pair<Stream *, uint64_t>;

struct PendingFree {
    void *memory;
    std::vector<Mark> marks;
};

// Streams are never destroyed: their detached threads may outlive everybody who knew them. For the
// same reason these are not destroyed at exit.
std::mutex &registry_mutex = *new std::mutex;
std::vector<Stream *> &streams = *new std::vector<Stream *>;
std::list<PendingFree> &pending_frees = *new std::list<PendingFree>;

Stream *as_stream(aclrtStream stream) { return static_cast<Stream *>(stream); }
Event *as_event(aclrtEvent event) { return static_cast<Event *>(event); }

std::vector<Stream *> all_streams()
{
    std::lock_guard<std::mutex> guard(registry_mutex);
    return streams;
}

aclrtStream make_stream()
{
    std::lock_guard<std::mutex> guard(registry_mutex);
    streams.push_back(new Stream(static_cast<int>(streams.size())));
    return streams.back();
}

void release_what_is_free()
{
    std::lock_guard<std::mutex> guard(registry_mutex);
    pending_frees.remove_if([](const PendingFree &pending) {
        for (auto &[stream, ticket] : pending.marks) {
            if (!stream->reached(ticket)) return false;
        }
        std::free(pending.memory);
        return true;
    });
}

aclError wait_for(aclrtStream stream, int milliseconds)
{
    Stream *known = as_stream(stream);
    return known ? known->wait(known->last_ticket(), milliseconds) : ACL_SUCCESS;
}

aclError wait_for_all(int milliseconds)
{
    aclError error = ACL_SUCCESS;
    for (Stream *stream : all_streams()) {
        if (aclError one = wait_for(stream, milliseconds)) error = one;
    }
    return error;
}

}  // namespace

void enqueue(aclrtStream stream, Task task) { as_stream(stream)->enqueue(std::move(task)); }

void launch(aclrtStream stream, Task task)
{
    Stream *known = as_stream(stream);
    if (known && known->threaded()) {
        known->enqueue(std::move(task));
    } else {
        task();
    }
}

void free_after_streams(void *memory)
{
    PendingFree pending{memory, {}};
    for (Stream *stream : all_streams()) {
        uint64_t last = stream->last_ticket();
        if (!stream->reached(last)) pending.marks.emplace_back(stream, last);
    }
    {
        std::lock_guard<std::mutex> guard(registry_mutex);
        pending_frees.push_back(std::move(pending));
    }
    release_what_is_free();
}

aclError drain(aclrtStream stream) { return wait_for(stream, kForEver); }

}  // namespace npusim

using namespace npusim;

// For the Python simulator, which computes at once: what runs on the stream must have ended.
EXPORT int npusim_drain(void *stream) { return drain(stream); }

// ---- streams

EXPORT aclError aclrtCreateStream(aclrtStream *stream)
{
    *stream = make_stream();
    return ACL_SUCCESS;
}

EXPORT aclError aclrtCreateStreamWithConfig(aclrtStream *stream, uint32_t, uint32_t)
{
    return aclrtCreateStream(stream);
}

EXPORT aclError aclrtDestroyStream(aclrtStream) { return ACL_SUCCESS; }

EXPORT aclError aclrtSynchronizeStream(aclrtStream stream) { return drain(stream); }

EXPORT aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t milliseconds)
{
    return wait_for(stream, milliseconds);
}

EXPORT aclError aclrtSynchronizeDevice(void) { return wait_for_all(kForEver); }

EXPORT aclError aclrtSynchronizeDeviceWithTimeout(int32_t milliseconds)
{
    return wait_for_all(milliseconds);
}

EXPORT aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus *status)
{
    Stream *known = as_stream(stream);
    bool complete = !known || known->reached(known->last_ticket());
    *status = complete ? ACL_STREAM_STATUS_COMPLETE : ACL_STREAM_STATUS_NOT_READY;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtStreamGetId(aclrtStream stream, int32_t *id)
{
    *id = stream ? as_stream(stream)->id : 0;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent event)
{
    Event recorded = *as_event(event);
    if (recorded.reached()) return recorded.wait();
    Stream *waiting = as_stream(stream);
    if (waiting == recorded.stream) return ACL_SUCCESS;
    if (!waiting || !waiting->threaded()) return recorded.wait();
    waiting->enqueue([recorded] { return recorded.wait(); });
    return ACL_SUCCESS;
}

// ---- events

EXPORT aclError aclrtCreateEventWithFlag(aclrtEvent *event, uint32_t)
{
    *event = new Event;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtCreateEventExWithFlag(aclrtEvent *event, uint32_t flag)
{
    return aclrtCreateEventWithFlag(event, flag);
}

EXPORT aclError aclrtDestroyEvent(aclrtEvent event)
{
    delete as_event(event);
    return ACL_SUCCESS;
}

EXPORT aclError aclrtRecordEvent(aclrtEvent event, aclrtStream stream)
{
    Stream *known = as_stream(stream);
    bool threaded = known && known->threaded();
    *as_event(event) = Event{std::chrono::steady_clock::now(), threaded ? known : nullptr,
                             threaded ? known->last_ticket() : 0};
    return ACL_SUCCESS;
}

EXPORT aclError aclrtResetEvent(aclrtEvent, aclrtStream) { return ACL_SUCCESS; }

EXPORT aclError aclrtSynchronizeEvent(aclrtEvent event) { return as_event(event)->wait(); }

EXPORT aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus *status)
{
    *status = as_event(event)->reached() ? ACL_EVENT_RECORDED_STATUS_COMPLETE
                                         : ACL_EVENT_RECORDED_STATUS_NOT_READY;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtQueryEventWaitStatus(aclrtEvent event, aclrtEventWaitStatus *status)
{
    *status = as_event(event)->reached() ? ACL_EVENT_WAIT_STATUS_COMPLETE
                                         : ACL_EVENT_WAIT_STATUS_NOT_READY;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtEventElapsedTime(float *milliseconds, aclrtEvent start, aclrtEvent end)
{
    std::chrono::duration<float, std::milli> elapsed =
        as_event(end)->recorded_at - as_event(start)->recorded_at;
    *milliseconds = elapsed.count();
    return ACL_SUCCESS;
}
