// Which accesses of a block's threads are ordered: vector clocks, and shadows of memory.
//
// A thread's clock is a base, shared by all threads that left a barrier together, and a count of
// its own that grows whenever others learn of it. An access of thread u at its count k has happened
// before thread t's present when t's base holds at least k for u.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace sw::emu {

using Base = std::shared_ptr<const std::vector<uint32_t>>;

struct Clock {
  Base base;
  uint32_t count = 1;
};

// What is known of the clocks of several threads together.
class Join {
 public:
  explicit Join(size_t threads) : known_(threads, 0) {}

  void add(int thread, const Clock& clock) {
    add(clock.base);
    if (known_[thread] < clock.count) known_[thread] = clock.count;
  }

  void add(const Base& base) {
    if (base == last_) return;  // threads that left a barrier together share it
    last_ = base;
    for (size_t i = 0; i < known_.size(); ++i)
      if (known_[i] < (*base)[i]) known_[i] = (*base)[i];
  }

  Base base() const { return std::make_shared<const std::vector<uint32_t>>(known_); }

 private:
  std::vector<uint32_t> known_;
  Base last_;
};

inline bool happened_before(int thread, uint32_t count, int present, const Clock& clock) {
  return thread == present || (*clock.base)[thread] >= count;
}

// The accesses to one byte of shared memory since its last ordered write.
struct SharedByte {
  int writer = -1, reader = -1;
  uint32_t write_count = 0, read_count = 0;
  bool atomic = false;                           // the last write
  std::unique_ptr<std::vector<uint32_t>> reads;  // of every thread, once several read it

  void read_by(int thread, const Clock& clock, size_t threads) {
    if (reads) {
      (*reads)[thread] = clock.count;
    } else if (reader < 0 || happened_before(reader, read_count, thread, clock)) {
      reader = thread, read_count = clock.count;
    } else {
      reads = std::make_unique<std::vector<uint32_t>>(threads, 0);
      (*reads)[reader] = read_count;
      (*reads)[thread] = clock.count;
    }
  }

  // A thread whose read is not ordered before the present of `thread`, or -1.
  int unordered_reader(int thread, const Clock& clock) const {
    if (!reads) {
      const bool ordered = reader < 0 || happened_before(reader, read_count, thread, clock);
      return ordered ? -1 : reader;
    }
    for (size_t u = 0; u < reads->size(); ++u)
      if ((*reads)[u] && !happened_before(int(u), (*reads)[u], thread, clock)) return int(u);
    return -1;
  }

  void written_by(int thread, const Clock& clock, bool is_atomic) {
    writer = thread, write_count = clock.count, atomic = is_atomic;
    reader = -1;
    reads.reset();
  }
};

// The last write to one byte of global memory.
struct GlobalByte {
  uint32_t launch = 0, block = 0, count = 0;
  int thread = -1;
  bool atomic = false;
};

}  // namespace sw::emu
