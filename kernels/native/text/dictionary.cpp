#include "dictionary.h"

#include <stdexcept>
#include <string>

namespace dqrm {
namespace {

constexpr size_t kMaxKeys = 0x7FFFFFFF;  // ids are int32
// Keys ahead at which a slot is fetched. Fetching the key it points to as well cost a tenth more
// than it saved, for 10,000 and for 5 million keys (Zen 4, 2026-11).
constexpr size_t kAhead = 24;
constexpr size_t kFirstKeys = 128;
// A dictionary grows by doubling, so it is at half of this on average; a vocabulary does not grow.
constexpr double kDictionaryLoad = 0.5;
constexpr double kVocabularyLoad = 0.6;

}  // namespace

SlotTable::SlotTable(size_t max_keys, double load)
    : slots_(size_t(double(max_keys) / load) + 2), max_keys_(max_keys) {}

Dictionary::Dictionary() : table_(kFirstKeys, kDictionaryLoad) {}

void Dictionary::encode(const uint64_t* keys, size_t count, int32_t* ids) {
  for (size_t i = 0; i < count; ++i) {
    if (i + kAhead < count) table_.prefetch_slot(keys[i + kAhead]);
    size_t place = 0;
    uint32_t number = table_.find(keys[i], keys_.data(), &place);
    if (number == 0) {
      if (table_.full()) {
        grow();
        table_.find(keys[i], keys_.data(), &place);
      }
      keys_.push_back(keys[i]);
      number = uint32_t(keys_.size());
      table_.put(place, keys[i], number);
    }
    ids[i] = int32_t(number - 1);
  }
}

void Dictionary::grow() {
  if (keys_.size() >= kMaxKeys / 2) throw std::length_error("more than 2^30 distinct keys");
  SlotTable larger(table_.size() * 2, kDictionaryLoad);
  for (size_t i = 0; i < keys_.size(); ++i) {
    size_t place = 0;
    larger.find(keys_[i], keys_.data(), &place);
    larger.put(place, keys_[i], uint32_t(i + 1));
  }
  table_ = std::move(larger);
}

KeyTable::KeyTable(const uint64_t* keys, size_t count) : keys_(keys), table_(count, kVocabularyLoad) {
  if (count > kMaxKeys) throw std::invalid_argument("vocabulary: more than 2^31 - 1 keys");
  for (size_t i = 0; i < count; ++i) {
    if (i + kAhead < count) table_.prefetch_slot(keys[i + kAhead]);
    size_t place = 0;
    const uint32_t number = table_.find(keys[i], keys_, &place);
    if (number != 0) {
      throw std::invalid_argument("vocabulary: keys " + std::to_string(number - 1) + " and " +
                                  std::to_string(i) + " are equal");
    }
    table_.put(place, keys[i], uint32_t(i + 1));
  }
}

void KeyTable::look_up(const uint64_t* query, size_t count, int32_t* ids) const {
  for (size_t i = 0; i < count; ++i) {
    if (i + kAhead < count) table_.prefetch_slot(query[i + kAhead]);
    size_t place = 0;
    ids[i] = int32_t(table_.find(query[i], keys_, &place));
  }
}

}  // namespace dqrm
