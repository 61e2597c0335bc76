"""Learns a WordPiece vocabulary, the same in every process.

Pieces are merged greedily by frequency, as byte-pair encoding does (Sennrich et al., ACL 2016), with WordPiece's "##"
before every piece that continues a word. The `tokenizers` library does the same, but breaks ties by the order of a hash
table, so two runs on the same texts get two vocabularies. Here a tie goes to the pair that comes first in the alphabet.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Mapping


def learn_wordpieces(word_counts: Mapping[str, int], size: int) -> list[str]:
    """Every letter in both forms (at the start of a word and inside), however many they are, then merges by frequency.

    Merging goes on until there are `size` pieces or every word is one piece.
    """
    letters = sorted({letter for word in word_counts for letter in word})
    pieces = letters + ["##" + letter for letter in letters]
    known = set(pieces)
    words = [[word[0], *("##" + letter for letter in word[1:])] for word in word_counts]
    weights = list(word_counts.values())
    counts: Counter[tuple[str, str]] = Counter()
    where: defaultdict[tuple[str, str], set[int]] = defaultdict(set)  # indices of the words that (may) hold the pair
    for index, word in enumerate(words):
        for pair in zip(word, word[1:], strict=False):
            counts[pair] += weights[index]
            where[pair].add(index)
    # Entries whose count is out of date are dropped when they come up; the current ones are always in the heap.
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    while heap and len(pieces) < size:
        count, pair = heapq.heappop(heap)
        if counts[pair] != -count:
            continue
        merged = pair[0] + pair[1].removeprefix("##")
        if merged not in known:  # a word that itself holds "##" can spell a known piece
            known.add(merged)
            pieces.append(merged)
        changed: set[tuple[str, str]] = set()
        for index in where.pop(pair):
            old = words[index]
            new: list[str] = []
            for piece in old:
                if new and (new[-1], piece) == pair:
                    new[-1] = merged
                else:
                    new.append(piece)
            words[index] = new
            for sign, pieces_of_word in ((-1, old), (1, new)):
                for neighbours in zip(pieces_of_word, pieces_of_word[1:], strict=False):
                    counts[neighbours] += sign * weights[index]
                    changed.add(neighbours)
                    if sign > 0:
                        where[neighbours].add(index)
        for neighbours in changed:
            if counts[neighbours] > 0:
                heapq.heappush(heap, (-counts[neighbours], neighbours))
    return pieces
