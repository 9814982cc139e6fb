//! What a server has reported by ParameterStatus. Pure.
//!
//! Each session and each backend holds such a set, and before every unit two of them are compared: so it is
//! one run of bytes, in one order, and not a tree.

/// The server's role, which no client is told again after its login: what it sees is one server that takes
/// writes.
pub const HOT_STANDBY: &[u8] = b"in_hot_standby";

/// Names and values of reported parameters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parameters {
    /// All but `in_hot_standby`: name, zero byte, value, zero byte, in the order of the names.
    pairs: Box<[u8]>,
    hot_standby: Option<Box<[u8]>>,
}

impl Parameters {
    /// The value of a parameter, by its exact name.
    pub fn get(&self, name: &[u8]) -> Option<&[u8]> {
        if name == HOT_STANDBY {
            return self.hot_standby.as_deref();
        }
        self.shown().find(|(held, _)| *held == name).map(|(_, value)| value)
    }

    /// All names and values.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.shown().chain(self.hot_standby.as_deref().map(|value| (HOT_STANDBY, value)))
    }

    /// Those of which clients are told whenever they change.
    pub fn shown(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let mut rest = &self.pairs[..];
        std::iter::from_fn(move || {
            let (name, behind) = crate::wire::cstr(rest)?;
            let (value, behind) = crate::wire::cstr(behind)?;
            rest = behind;
            Some((name, value))
        })
    }

    /// Whether [`shown`](Self::shown) gives the same of both.
    pub fn shows_the_same(&self, other: &Parameters) -> bool {
        self.pairs == other.pairs
    }

    /// Sets a parameter. What cannot have come in a message, because it holds a zero byte, is not taken.
    pub fn insert(&mut self, name: &[u8], value: &[u8]) {
        if name.contains(&0) || value.contains(&0) {
            return;
        }
        if name == HOT_STANDBY {
            self.hot_standby = Some(value.into());
            return;
        }
        let mut pairs = Vec::with_capacity(self.pairs.len() + name.len() + value.len() + 2);
        let mut put = |name: &[u8], value: &[u8]| {
            for part in [name, b"\0", value, b"\0"] {
                pairs.extend_from_slice(part);
            }
        };
        for (held, value) in self.shown().filter(|(held, _)| *held < name) {
            put(held, value);
        }
        put(name, value);
        for (held, value) in self.shown().filter(|(held, _)| *held > name) {
            put(held, value);
        }
        self.pairs = pairs.into();
    }
}

impl<N: AsRef<[u8]>, V: AsRef<[u8]>> FromIterator<(N, V)> for Parameters {
    fn from_iter<I: IntoIterator<Item = (N, V)>>(pairs: I) -> Parameters {
        let mut parameters = Parameters::default();
        for (name, value) in pairs {
            parameters.insert(name.as_ref(), value.as_ref());
        }
        parameters
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_reports_does_not_matter_and_the_last_value_counts() {
        let one: Parameters = [("b", "1"), ("a", ""), ("c", "3"), ("b", "2")].into_iter().collect();
        let other: Parameters = [("c", "3"), ("b", "2"), ("a", "")].into_iter().collect();
        assert_eq!(one, other);
        assert_eq!(one.iter().collect::<Vec<_>>(), [(&b"a"[..], &b""[..]), (b"b", b"2"), (b"c", b"3")]);
        assert_eq!(one.get(b"b"), Some(&b"2"[..]));
        assert_eq!(one.get(b"B"), None);
    }

    #[test]
    fn two_nodes_show_clients_the_same() {
        let of = |standby, zone| -> Parameters {
            [("TimeZone", zone), ("in_hot_standby", standby)].into_iter().collect()
        };
        assert!(of("on", "UTC").shows_the_same(&of("off", "UTC")));
        assert!(!of("on", "UTC").shows_the_same(&of("on", "GMT")));
        assert_eq!(of("on", "UTC").get(HOT_STANDBY), Some(&b"on"[..]));
        assert_eq!(of("on", "UTC").iter().count(), 2);
        assert_eq!(of("on", "UTC").shown().count(), 1);
    }

    #[test]
    fn a_zero_byte_cannot_make_one_parameter_two() {
        let mut parameters = Parameters::default();
        parameters.insert(b"a", b"1\x00b\x00002");
        parameters.insert(b"a\0b", b"1");
        assert_eq!(parameters, Parameters::default());
    }
}
