//! Which word was probably meant by one that is none. Pure.

/// Longer ones are nobody's slip.
const LONGEST: usize = 100;

/// The nearest of `words`, unless more than two fifths of `given` had to change: that is no slip.
pub fn nearest<'a>(given: &str, words: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let length = given.chars().count();
    let (far, word) = words.into_iter().map(|word| (distance(given, word), word)).min()?;
    (far > 0 && far * 5 <= length * 2 && length <= LONGEST).then_some(word)
}

/// Insertions, deletions and replacements between two short texts.
pub fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().take(LONGEST).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
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
            ("nodes", None),
            ("x", None),
            ("hunter2", None),
            ("", None),
        ] {
            assert_eq!(nearest(given, words), expected, "{given}");
        }
        assert_eq!(nearest(&"x".repeat(1000), words), None);
    }
}
