// Registered buffers, and the checks of every access to global and shared memory; see emulator.h.
#include "emu/machine.h"

namespace sw::emu {
namespace {

const char* verb(Access access) {
  return access == Access::kRead     ? "reads"
         : access == Access::kWrite ? "writes"
                                     : "atomically adds to";
}

Buffer& find_buffer(uintptr_t begin, size_t bytes, Access access) {
  Machine& m = machine();
  const auto holds = [&](const Buffer& b) { return b.begin <= begin && begin + bytes <= b.end; };
  if (m.last_buffer < m.buffers.size() && holds(m.buffers[m.last_buffer]))
    return m.buffers[m.last_buffer];
  const Buffer* nearest = nullptr;
  uintptr_t distance = UINTPTR_MAX;
  for (size_t i = 0; i < m.buffers.size(); ++i) {
    Buffer& b = m.buffers[i];
    if (holds(b)) {
      m.last_buffer = i;
      return b;
    }
    const uintptr_t gap = begin < b.begin ? b.begin - begin : begin < b.end ? 0 : begin - b.end;
    if (gap < distance) distance = gap, nearest = &b;
  }
  if (!nearest) fail("%s global memory at %p, but no buffer is registered", verb(access),
                     reinterpret_cast<void*>(begin));
  fail("is out of bounds: it %s %zu bytes of global memory at %p; the nearest buffer is %s, %zu "
       "bytes at %p (offset %lld)",
       verb(access), bytes, reinterpret_cast<void*>(begin), nearest->name.c_str(),
       size_t(nearest->end - nearest->begin), reinterpret_cast<void*>(nearest->begin),
       static_cast<long long>(begin - nearest->begin));
}

void check_alignment(const void* address, size_t alignment, Access access, const char* space) {
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0)
    fail("is misaligned: it %s %s memory at %p, which is no multiple of %zu", verb(access), space,
         address, alignment);
}

bool same_thread_or_ordered(const GlobalByte& byte) {
  const Machine& m = machine();
  if (byte.launch != m.launch_number) return true;  // an earlier launch on the stream
  if (byte.block != m.block_number) return false;
  return happened_before(byte.thread, byte.count, m.current, m.fibers[m.current].clock);
}

}  // namespace

void register_buffer(const void* begin, int64_t bytes, bool writable, const char* name) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(begin);
  machine().buffers.push_back(
      {address, address + uintptr_t(bytes), writable, name, std::vector<GlobalByte>(bytes)});
}

void clear_buffers() {
  machine().buffers.clear();
  machine().last_buffer = 0;
}

void global_access(const void* address, size_t bytes, size_t alignment, Access access) {
  Machine& m = machine();
  check_alignment(address, alignment, access, "global");
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
  Buffer& buffer = find_buffer(begin, bytes, access);
  if (access != Access::kRead && !buffer.writable)
    fail("%s %zu bytes of the read-only buffer %s at offset %zu", verb(access), bytes,
         buffer.name.c_str(), size_t(begin - buffer.begin));
  const bool atomic = access == Access::kAtomic;
  m.used_atomics |= atomic;
  for (size_t i = begin - buffer.begin; i < begin - buffer.begin + bytes; ++i) {
    GlobalByte& byte = buffer.bytes[i];
    const bool exempt = (atomic && byte.atomic) ||
                        (access == Access::kRead && m.used_atomics && byte.block != m.block_number);
    if (byte.thread >= 0 && !exempt && !same_thread_or_ordered(byte))
      fail("races on global memory: it %s %zu bytes of %s at offset %zu, which thread %d of block "
           "%u wrote in the same launch without a barrier in between",
           verb(access), bytes, buffer.name.c_str(), size_t(begin - buffer.begin), byte.thread,
           byte.block);
    if (access != Access::kRead)
      byte = {m.launch_number, m.block_number, self().clock.count, m.current, atomic};
  }
}

void* shared_memory() { return machine().shared_begin; }

void shared_access(const void* address, size_t bytes, size_t alignment, Access access) {
  Machine& m = machine();
  check_alignment(address, alignment, access, "shared");
  const ptrdiff_t offset = static_cast<const unsigned char*>(address) - m.shared_begin;
  if (offset < 0 || size_t(offset) + bytes > m.grid.shared_bytes)
    fail("is out of bounds: it %s %zu bytes at shared+0x%zx; the launch asked for %zu bytes",
         verb(access), bytes, size_t(offset), m.grid.shared_bytes);
  const Clock& clock = self().clock;
  for (size_t i = offset; i < size_t(offset) + bytes; ++i) {
    SharedByte& byte = m.shadow[i];
    if (byte.writer < 0 && access != Access::kWrite)
      fail("%s unwritten shared memory: %zu bytes at shared+0x%zx", verb(access), bytes,
           size_t(offset));
    const bool both_atomic = byte.atomic && access == Access::kAtomic;
    const bool raced = byte.writer >= 0 && !both_atomic &&
                       !happened_before(byte.writer, byte.write_count, m.current, clock);
    const int reader = access == Access::kRead ? -1 : byte.unordered_reader(m.current, clock);
    if (raced || reader >= 0)
      fail("races on shared memory: it %s %zu bytes at shared+0x%zx, which thread %d %s without a "
           "barrier in between",
           verb(access), bytes, size_t(offset), raced ? byte.writer : reader,
           raced ? "wrote" : "read");
    if (access == Access::kRead)
      byte.read_by(m.current, clock, m.grid.threads);
    else
      byte.written_by(m.current, clock, access == Access::kAtomic);
  }
}

void outside_array(const void* array, int64_t index, int64_t count, int64_t size, int item) {
  fail("is out of bounds: elements %lld to %lld of an array of %lld at shared+0x%zx, %d bytes each",
       static_cast<long long>(index), static_cast<long long>(index + count - 1),
       static_cast<long long>(size),
       size_t(static_cast<const unsigned char*>(array) - machine().shared_begin), item);
}

}  // namespace sw::emu

extern "C" __attribute__((visibility("default"))) void sw_emu_register(const void* begin,
                                                                       int64_t bytes, int writable,
                                                                       const char* name) {
  sw::emu::register_buffer(begin, bytes, writable != 0, name);
}

extern "C" __attribute__((visibility("default"))) void sw_emu_clear() {
  sw::emu::clear_buffers();
}
