// libhccl.so: the HCCL calls that torch_npu's ProcessGroupHCCL makes, between the processes of one
// host. It says nothing about the real HCCL's algorithms, speed, limits or error codes. hccl.h is
// left out on purpose: releases differ in the `const` of its pointers.
//
// HCCL_SIM_TIMEOUT     seconds a rank waits for the others (60)
// HCCL_SIM_RENDEZVOUS  when set, a send ends only when it has been received
// HCCL_SIM_LOG         a file per process (its pid appended) with one line per call
#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <map>
#include <string>
#include <utility>

#include "hccl_collectives.h"

using namespace npusim;

namespace {

Communicator &as_communicator(HcclComm comm) { return *static_cast<Communicator *>(comm); }

FILE *open_log()
{
    const char *path = std::getenv("HCCL_SIM_LOG");
    if (!path) return nullptr;
    return std::fopen((std::string(path) + "." + std::to_string(getpid())).c_str(), "a");
}

// One line per call: name, communicator, ranks, rank, elements, dtype, and the peer or -1.
void log_call(const char *op, const Communicator &comm, uint64_t count, HcclDataType dtype,
              int peer = -1)
{
    static FILE *log = open_log();
    if (!log) return;
    std::fprintf(log, "%s %s %u %u %lu %d %d\n", op, comm.name.c_str(), comm.size, comm.rank,
                 static_cast<unsigned long>(count), dtype, peer);
    std::fflush(log);
}

HcclResult submit(Communicator &comm, aclrtStream stream, Task task)
{
    if (comm.error()) return static_cast<HcclResult>(comm.error());
    enqueue(stream, [&comm, task = std::move(task)] {
        if (!comm.error()) task();
        return comm.error();
    });
    return HCCL_SUCCESS;
}

using Operation = int (*)(Communicator &, const Collective &);

HcclResult submit(HcclComm handle, aclrtStream stream, Operation run, Collective call)
{
    Communicator &comm = as_communicator(handle);
    log_call(call.op, comm, call.count, call.dtype);
    return submit(comm, stream, [&comm, run, call] { return run(comm, call); });
}

// ---- sends and receives between HcclGroupStart and HcclGroupEnd become one call per stream

using Items = std::vector<HcclSendRecvItem>;
thread_local int group_depth = 0;
thread_local std::map<std::pair<HcclComm, aclrtStream>, Items> grouped;

HcclResult exchange(HcclComm handle, aclrtStream stream, const Items &items)
{
    if (group_depth > 0) {
        Items &waiting = grouped[{handle, stream}];
        waiting.insert(waiting.end(), items.begin(), items.end());
        return HCCL_SUCCESS;
    }
    Communicator &comm = as_communicator(handle);
    for (const HcclSendRecvItem &item : items) {
        log_call(item.sendRecvType == HCCL_SEND ? "Send" : "Receive", comm, item.count,
                 item.dataType, static_cast<int>(item.remoteRank));
    }
    return submit(comm, stream, [&comm, items] { return send_receive(comm, items); });
}

}  // namespace

EXPORT HcclResult HcclGroupStart(void)
{
    group_depth++;
    return HCCL_SUCCESS;
}

EXPORT HcclResult HcclGroupEnd(void)
{
    if (--group_depth > 0) return HCCL_SUCCESS;
    auto calls = std::move(grouped);
    grouped.clear();
    HcclResult result = HCCL_SUCCESS;
    for (auto &[place, items] : calls) {
        if (HcclResult error = exchange(place.first, place.second, items)) result = error;
    }
    return result;
}

EXPORT HcclResult HcclSend(void *data, uint64_t count, HcclDataType dtype, uint32_t to,
                           HcclComm comm, aclrtStream stream)
{
    return exchange(comm, stream, {{HCCL_SEND, data, count, dtype, to}});
}

EXPORT HcclResult HcclRecv(void *data, uint64_t count, HcclDataType dtype, uint32_t from,
                           HcclComm comm, aclrtStream stream)
{
    return exchange(comm, stream, {{HCCL_RECV, data, count, dtype, from}});
}

EXPORT HcclResult HcclBatchSendRecv(HcclSendRecvItem *items, uint32_t count, HcclComm comm,
                                    aclrtStream stream)
{
    return exchange(comm, stream, Items(items, items + count));
}

// ---- collectives

EXPORT HcclResult HcclBarrier(HcclComm comm, aclrtStream stream)
{
    return submit(comm, stream, barrier, {"Barrier", HCCL_DATA_TYPE_INT8});
}

EXPORT HcclResult HcclAllReduce(void *send, void *receive, uint64_t count, HcclDataType dtype,
                                HcclReduceOp op, HcclComm comm, aclrtStream stream)
{
    return submit(comm, stream, all_reduce, {"AllReduce", dtype, send, receive, count, op});
}

EXPORT HcclResult HcclReduce(void *send, void *receive, uint64_t count, HcclDataType dtype,
                             HcclReduceOp op, uint32_t root, HcclComm comm, aclrtStream stream)
{
    return submit(comm, stream, reduce_to_root,
                  {"Reduce", dtype, send, receive, count, op, root});
}

EXPORT HcclResult HcclBroadcast(void *data, uint64_t count, HcclDataType dtype, uint32_t root,
                                HcclComm comm, aclrtStream stream)
{
    return submit(comm, stream, broadcast,
                  {"Broadcast", dtype, data, data, count, HCCL_REDUCE_SUM, root});
}

EXPORT HcclResult HcclScatter(void *send, void *receive, uint64_t count, HcclDataType dtype,
                              uint32_t root, HcclComm comm, aclrtStream stream)
{
    Collective call{"Scatter", dtype, send, receive, count, HCCL_REDUCE_SUM, root};
    call.sends = Parts::equal(as_communicator(comm).size, count);
    return submit(comm, stream, scatter, call);
}

EXPORT HcclResult HcclAllGather(void *send, void *receive, uint64_t count, HcclDataType dtype,
                                HcclComm comm, aclrtStream stream)
{
    Collective call{"AllGather", dtype, send, receive, count};
    call.receives = Parts::equal(as_communicator(comm).size, count);
    return submit(comm, stream, all_gather, call);
}

EXPORT HcclResult HcclAllGatherV(void *send, uint64_t count, void *receive, const void *counts,
                                 const void *offsets, HcclDataType dtype, HcclComm comm,
                                 aclrtStream stream)
{
    Collective call{"AllGatherV", dtype, send, receive, count};
    call.receives = Parts::of(as_communicator(comm).size, counts, offsets);
    return submit(comm, stream, all_gather, call);
}

EXPORT HcclResult HcclReduceScatter(void *send, void *receive, uint64_t count, HcclDataType dtype,
                                    HcclReduceOp op, HcclComm comm, aclrtStream stream)
{
    Collective call{"ReduceScatter", dtype, send, receive, count, op};
    call.sends = Parts::equal(as_communicator(comm).size, count);
    return submit(comm, stream, reduce_scatter, call);
}

EXPORT HcclResult HcclReduceScatterV(void *send, const void *counts, const void *offsets,
                                     void *receive, uint64_t count, HcclDataType dtype,
                                     HcclReduceOp op, HcclComm comm, aclrtStream stream)
{
    Collective call{"ReduceScatterV", dtype, send, receive, count, op};
    call.sends = Parts::of(as_communicator(comm).size, counts, offsets);
    return submit(comm, stream, reduce_scatter, call);
}

EXPORT HcclResult HcclAlltoAllV(const void *send, const void *send_counts, const void *send_offsets,
                                HcclDataType dtype, const void *receive,
                                const void *receive_counts, const void *receive_offsets,
                                HcclDataType receive_dtype, HcclComm comm, aclrtStream stream)
{
    if (dtype != receive_dtype) return HCCL_E_PARA;
    uint32_t size = as_communicator(comm).size;
    Collective call{"AlltoAll", dtype, send, const_cast<void *>(receive)};
    call.sends = Parts::of(size, send_counts, send_offsets);
    call.receives = Parts::of(size, receive_counts, receive_offsets);
    for (uint64_t count : call.sends.counts) call.count += count;
    return submit(comm, stream, all_to_all, call);
}

EXPORT HcclResult HcclAlltoAll(const void *send, uint64_t send_count, HcclDataType send_dtype,
                               const void *receive, uint64_t receive_count,
                               HcclDataType receive_dtype, HcclComm comm, aclrtStream stream)
{
    uint32_t size = as_communicator(comm).size;
    Parts sends = Parts::equal(size, send_count);
    Parts receives = Parts::equal(size, receive_count);
    return HcclAlltoAllV(send, sends.counts.data(), sends.offsets.data(), send_dtype, receive,
                         receives.counts.data(), receives.offsets.data(), receive_dtype, comm,
                         stream);
}

// ---- communicators

EXPORT HcclResult HcclGetRootInfo(HcclRootInfo *info)
{
    static std::atomic<int> number{0};
    timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    std::memset(info, 0, sizeof *info);
    std::snprintf(info->internal, sizeof info->internal, "/hcclsim_%d_%d_%ld", getpid(), number++,
                  now.tv_nsec);
    return HCCL_SUCCESS;
}

EXPORT HcclResult HcclCommInitRootInfoConfig(uint32_t size, const HcclRootInfo *info, uint32_t rank,
                                             const HcclCommConfig *config, HcclComm *comm)
{
    if (size == 0 || size > kMaxRanks || rank >= size) return HCCL_E_PARA;
    bool named = config && config->hcclCommName[0];
    std::string name = named ? config->hcclCommName : info->internal + 1;
    *comm = Communicator::join(info->internal, name, size, rank);
    return *comm ? HCCL_SUCCESS : HCCL_E_TIMEOUT;
}

EXPORT HcclResult HcclCommInitRootInfo(uint32_t size, const HcclRootInfo *info, uint32_t rank,
                                       HcclComm *comm)
{
    return HcclCommInitRootInfoConfig(size, info, rank, nullptr, comm);
}

// The memory stays mapped: a stream's thread may still be at work in it.
EXPORT HcclResult HcclCommDestroy(HcclComm) { return HCCL_SUCCESS; }

EXPORT HcclResult HcclGetCommName(HcclComm comm, char *name)
{
    std::snprintf(name, COMM_NAME_MAX_LENGTH, "%s", as_communicator(comm).name.c_str());
    return HCCL_SUCCESS;
}

EXPORT HcclResult HcclGetRankSize(HcclComm comm, uint32_t *size)
{
    *size = as_communicator(comm).size;
    return HCCL_SUCCESS;
}

EXPORT HcclResult HcclGetRankId(HcclComm comm, uint32_t *rank)
{
    *rank = as_communicator(comm).rank;
    return HCCL_SUCCESS;
}

EXPORT HcclResult HcclGetCommAsyncError(HcclComm comm, HcclResult *error)
{
    *error = static_cast<HcclResult>(as_communicator(comm).error());
    return HCCL_SUCCESS;
}

EXPORT uint32_t HcclGetCommConfigCapability(void) { return HCCL_COMM_CONFIG_RESERVED; }

EXPORT const char *HcclGetErrorString(HcclResult) { return "simulated HCCL: see stderr"; }
