// Hash tables from 64-bit keys to small numbers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace dqrm {

__extension__ typedef unsigned __int128 Wide;

// Open addressing with linear probing. A slot holds the number of a key plus one in its low half
// (0: free) and a part of the key's hash in its high half; the keys lie in an array of their own.
// Eight bytes a slot, so that twice as much of a table stays in cache as with keys inside.
class SlotTable {
 public:
  // Room for this many keys at the given share of used slots.
  SlotTable(size_t max_keys, double load);

  bool full() const { return count_ >= max_keys_; }
  size_t size() const { return count_; }

  void prefetch_slot(uint64_t key) const { __builtin_prefetch(&slots_[home(mix(key))]); }

  // Number of the key plus one; if it is not there: 0, and *place is the slot to put it into.
  uint32_t find(uint64_t key, const uint64_t* keys, size_t* place) const {
    const uint64_t mixed = mix(key);
    for (size_t at = home(mixed);; at = at + 1 == slots_.size() ? 0 : at + 1) {
      const uint64_t slot = slots_[at];
      if (slot == 0) {
        *place = at;
        return 0;
      }
      if (uint32_t(slot >> 32) == uint32_t(mixed) && keys[uint32_t(slot) - 1] == key) {
        return uint32_t(slot);
      }
    }
  }

  void put(size_t place, uint64_t key, uint32_t number_plus_one) {
    slots_[place] = uint64_t{uint32_t(mix(key))} << 32 | number_plus_one;
    ++count_;
  }

 private:
  // Keys need not be hashes: consecutive numbers must not share one run of slots.
  static uint64_t mix(uint64_t key) { return key * 0x9E3779B97F4A7C15u; }

  size_t home(uint64_t mixed) const {
    return size_t(static_cast<Wide>(mixed) * slots_.size() >> 64);
  }

  std::vector<uint64_t> slots_;
  size_t max_keys_;
  size_t count_ = 0;
};

// Numbers distinct keys in order of first sight.
class Dictionary {
 public:
  Dictionary();

  // Ids of `count` keys. Throws std::length_error beyond 2^31 - 1 distinct keys.
  void encode(const uint64_t* keys, size_t count, int32_t* ids);

  std::vector<uint64_t> take_keys() { return std::move(keys_); }

 private:
  void grow();

  SlotTable table_;
  std::vector<uint64_t> keys_;
};

// Look-up of a fixed set of keys; keys[i] has id i + 1.
class KeyTable {
 public:
  // The keys must outlive the table. Throws std::invalid_argument for a repeated key.
  KeyTable(const uint64_t* keys, size_t count);

  // Ids of `count` keys, 0 = unknown.
  void look_up(const uint64_t* query, size_t count, int32_t* ids) const;

 private:
  const uint64_t* keys_;
  SlotTable table_;
};

}  // namespace dqrm
