// A message is a header and its bytes in the ring from sender to receiver. Items of one call make
// progress side by side, except that messages to (or from) the same rank keep their order.
#include <algorithm>
#include <cstdlib>

#include "hccl_collectives.h"

namespace npusim {
namespace {

struct Header {
    uint64_t bytes;
    uint64_t dtype;
};

// HCCL_SIM_RENDEZVOUS: a send ends only when it has been received, as an unbuffered one would.
bool rendezvous()
{
    static const bool wanted = std::getenv("HCCL_SIM_RENDEZVOUS") != nullptr;
    return wanted;
}

class Message {
public:
    Message(Communicator &comm, const HcclSendRecvItem &item)
        : comm_(comm),
          item_(item),
          bytes_(item.count * size_of(item.dataType)),
          ring_(sends() ? comm.ring(comm.rank, item.remoteRank)
                        : comm.ring(item.remoteRank, comm.rank))
    {
    }

    bool sends() const { return item_.sendRecvType == HCCL_SEND; }
    uint32_t peer() const { return item_.remoteRank; }
    bool done() const { return state_ == State::done; }

    // Whether a later message of the same direction and peer must still wait.
    bool blocks(const Message &later) const
    {
        bool occupies = state_ == State::header || state_ == State::body;
        return occupies && sends() == later.sends() && peer() == later.peer();
    }

    // Whether `advance` would do anything now.
    bool can_advance() const
    {
        switch (state_) {
            case State::header:
                return (sends() ? ring_.room() : ring_.filled()) >= sizeof(Header);
            case State::body: return moved_ == bytes_ || (sends() ? ring_.room() : ring_.filled());
            case State::awaits_reader: return ring_.read >= end_;
            default: return false;
        }
    }

    int advance()
    {
        switch (state_) {
            case State::header: return sends() ? put_header() : get_header();
            case State::body: move_body(); return 0;
            default: state_ = State::done; return 0;
        }
    }

    std::string text() const
    {
        return std::string(sends() ? "send to" : "receive from") + " rank " +
               std::to_string(peer()) + ", " + std::to_string(moved_) + " of " +
               std::to_string(bytes_) + " bytes";
    }

private:
    enum class State { header, body, awaits_reader, done };

    int put_header()
    {
        Header header{bytes_, static_cast<uint64_t>(item_.dataType)};
        ring_.put(&header, sizeof header);
        state_ = State::body;
        return 0;
    }

    int get_header()
    {
        Header header;
        ring_.get(&header, sizeof header);
        state_ = State::body;
        if (header.bytes == bytes_ && header.dtype == static_cast<uint64_t>(item_.dataType)) {
            return 0;
        }
        return comm_.fail(HCCL_E_PARA,
                          "MISMATCH: receive of " + std::to_string(bytes_) + " bytes, dtype " +
                              std::to_string(item_.dataType) + ", from rank " +
                              std::to_string(peer()) + ", which sends " +
                              std::to_string(header.bytes) + " bytes, dtype " +
                              std::to_string(header.dtype));
    }

    void move_body()
    {
        char *place = static_cast<char *>(item_.buf) + moved_;
        uint64_t available = sends() ? ring_.room() : ring_.filled();
        uint64_t size = std::min(bytes_ - moved_, available);
        if (sends()) {
            ring_.put(place, size);
        } else {
            ring_.get(place, size);
        }
        moved_ += size;
        if (moved_ < bytes_) return;
        end_ = ring_.written;
        state_ = sends() && rendezvous() ? State::awaits_reader : State::done;
    }

    Communicator &comm_;
    const HcclSendRecvItem item_;
    const uint64_t bytes_;
    Ring &ring_;
    uint64_t moved_ = 0;
    uint64_t end_ = 0;
    State state_ = State::header;
};

// The messages that may move now: not done, and none before them in the same ring.
std::vector<Message *> movable(std::vector<Message> &messages)
{
    std::vector<Message *> free;
    for (auto later = messages.begin(); later != messages.end(); ++later) {
        bool blocked = std::any_of(messages.begin(), later,
                                   [&](const Message &m) { return m.blocks(*later); });
        if (!later->done() && !blocked) free.push_back(&*later);
    }
    return free;
}

int wait_for_any(Communicator &comm, const std::vector<Message *> &messages)
{
    std::vector<uint32_t> peers;
    for (const Message *message : messages) peers.push_back(message->peer());
    auto any = [&] {
        return std::any_of(messages.begin(), messages.end(),
                           [](const Message *message) { return message->can_advance(); });
    };
    return comm.wait(any, peers, messages.front()->text());
}

}  // namespace

int send_receive(Communicator &comm, const std::vector<HcclSendRecvItem> &items)
{
    std::vector<Message> messages;
    for (const HcclSendRecvItem &item : items) {
        if (item.remoteRank >= comm.size) return comm.fail(HCCL_E_PARA, "no such remote rank");
        messages.emplace_back(comm, item);
    }
    for (;;) {
        std::vector<Message *> open = movable(messages);
        if (open.empty()) return 0;
        if (int error = wait_for_any(comm, open)) return error;
        for (Message *message : open) {
            if (!message->can_advance()) continue;
            if (int error = message->advance()) return error;
        }
        comm.notify();
    }
}

}  // namespace npusim
