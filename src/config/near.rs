//! Which word was probably meant by one that is none. Pure.

/// Longer ones are nobody's slip.
const LONGEST: usize = 100;

/// The nearest of `words`, unless more than two fifths of `given` had to change: that is no slip.
pub fn nearest<'a>(given: &str, words: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let length = given.chars().count();
    let (far, word) = words.into_iter().map(|word| (distance(given, word), word)).min()?;
    (far > 0 && far * 5 <= length * 2 && length <= LONGEST).then_some(word)
}

/// Insertions, deletions, replacements and exchanges of neighbours between two short texts.
pub fn distance(a: &str, b: &str) -> usize {
    let a: Vec<char> = a.chars().take(LONGEST).collect();
    let b: Vec<char> = b.chars().collect();
    // The distances of what comes before the last two characters, and before the last one.
    let (mut earlier, mut before): (Vec<usize>, Vec<usize>) = (Vec::new(), (0..=b.len()).collect());
    for (i, x) in a.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, y) in b.iter().enumerate() {
            let mut least = (before[j] + usize::from(x != y)).min(before[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && *x == b[j - 1] && a[i - 1] == *y {
                least = least.min(earlier[j - 1] + 1);
            }
            row.push(least);
        }
        earlier = std::mem::replace(&mut before, row);
    }
    before[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_has_a_word_and_anything_else_has_none() {
        let words = ["listen", "nodes", "max_clients", "password"];
        for (given, expected) in [
            ("nodez", Some("nodes")),
            ("node", Some("nodes")),
            ("max_clents", Some("max_clients")),
            ("pasword", Some("password")),
            ("ndoes", Some("nodes")),
            ("lsiten", Some("listen")),
            ("nodes", None),
            ("x", None),
            ("hunter2", None),
            ("", None),
        ] {
            assert_eq!(nearest(given, words), expected, "{given}");
        }
        assert_eq!(nearest(&"x".repeat(1000), words), None);
        for (a, b, far) in
            [("prot", "port", 1), ("", "ab", 2), ("ab", "", 2), ("shwo", "show", 1), ("abc", "cab", 2)]
        {
            assert_eq!(distance(a, b), far, "{a} {b}");
        }
    }
}
