//! The few facts of an X.509 certificate that TLS libraries do not hand out: with which hash its
//! signature was made (channel binding, RFC 5929) and when it is valid. Pure.
//!
//! Promises: no input panics; what is not understood is `None`. Deliberately not here: verification.

use ring::digest;

/// DER object identifiers, contents only.
mod oid {
    pub const MD5_RSA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 4];
    pub const SHA1_RSA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 5];
    pub const RSA_PSS: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 10];
    pub const SHA256_RSA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 11];
    pub const SHA384_RSA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 12];
    pub const SHA512_RSA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 13];
    pub const SHA1_ECDSA: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 1];
    pub const SHA256_ECDSA: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2];
    pub const SHA384_ECDSA: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 3];
    pub const SHA512_ECDSA: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 4];
    pub const SHA1: &[u8] = &[0x2b, 0x0e, 3, 2, 0x1a];
    pub const SHA256: &[u8] = &[0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, 1];
    pub const SHA384: &[u8] = &[0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, 2];
    pub const SHA512: &[u8] = &[0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, 3];
}

const SEQUENCE: u8 = 0x30;
const OBJECT_IDENTIFIER: u8 = 0x06;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
const EXPLICIT_0: u8 = 0xa0;

/// Takes one element off the front: (tag, contents).
fn element<'a>(der: &mut &'a [u8]) -> Option<(u8, &'a [u8])> {
    let (&tag, rest) = der.split_first()?;
    let (&first, mut rest) = rest.split_first()?;
    let length = if first < 0x80 {
        usize::from(first)
    } else {
        // Four bytes of length are more than any message that carries a certificate can have.
        let count = usize::from(first & 0x7f);
        if count == 0 || count > 4 || rest.len() < count {
            return None;
        }
        let (bytes, after) = rest.split_at(count);
        rest = after;
        bytes.iter().fold(0, |length, &byte| length << 8 | usize::from(byte))
    };
    if rest.len() < length {
        return None;
    }
    let (contents, rest) = rest.split_at(length);
    *der = rest;
    Some((tag, contents))
}

/// Takes one element off the front that must have this tag.
fn expect<'a>(der: &mut &'a [u8], wanted: u8) -> Option<&'a [u8]> {
    element(der).and_then(|(tag, contents)| (tag == wanted).then_some(contents))
}

/// The `tls-server-end-point` hash of a certificate: by the hash of its signature algorithm, SHA-256
/// in place of MD5 and SHA-1. `None` where the algorithm has no single hash (Ed25519) or is not known.
pub fn end_point_hash(certificate: &[u8]) -> Option<Vec<u8>> {
    let mut outer = certificate;
    let mut fields = expect(&mut outer, SEQUENCE)?;
    expect(&mut fields, SEQUENCE)?;
    let mut algorithm = expect(&mut fields, SEQUENCE)?;
    let name = expect(&mut algorithm, OBJECT_IDENTIFIER)?;
    let hash = if name == oid::RSA_PSS { pss_hash(algorithm)? } else { name };
    let hash = match hash {
        oid::MD5_RSA | oid::SHA1_RSA | oid::SHA1_ECDSA | oid::SHA1 => &digest::SHA256,
        oid::SHA256_RSA | oid::SHA256_ECDSA | oid::SHA256 => &digest::SHA256,
        oid::SHA384_RSA | oid::SHA384_ECDSA | oid::SHA384 => &digest::SHA384,
        oid::SHA512_RSA | oid::SHA512_ECDSA | oid::SHA512 => &digest::SHA512,
        _ => return None,
    };
    Some(digest::digest(hash, certificate).as_ref().to_vec())
}

/// RSASSA-PSS names its hash in its parameters; SHA-1 when it does not.
fn pss_hash(mut parameters: &[u8]) -> Option<&[u8]> {
    let mut fields = expect(&mut parameters, SEQUENCE)?;
    match element(&mut fields) {
        Some((EXPLICIT_0, mut hash)) => {
            let mut algorithm = expect(&mut hash, SEQUENCE)?;
            expect(&mut algorithm, OBJECT_IDENTIFIER)
        }
        _ => Some(oid::SHA1),
    }
}

/// When a certificate is valid, in seconds since 1970, both ends included.
pub fn validity(certificate: &[u8]) -> Option<(i64, i64)> {
    let mut outer = certificate;
    let mut fields = expect(&mut outer, SEQUENCE)?;
    let mut body = expect(&mut fields, SEQUENCE)?;
    // The version is optional; a serial number, algorithm and issuer stand before the validity.
    let (tag, _) = element(&mut body)?;
    for _ in 0..if tag == EXPLICIT_0 { 3 } else { 2 } {
        element(&mut body)?;
    }
    let mut validity = expect(&mut body, SEQUENCE)?;
    let from = time(element(&mut validity)?)?;
    let to = time(element(&mut validity)?)?;
    Some((from, to))
}

/// `YYMMDDHHMMSSZ` or `YYYYMMDDHHMMSSZ` in seconds since 1970.
fn time((tag, text): (u8, &[u8])) -> Option<i64> {
    let digits = text.strip_suffix(b"Z")?;
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number = |range: std::ops::Range<usize>| -> Option<i64> {
        Some(digits.get(range)?.iter().fold(0, |sum, &digit| sum * 10 + i64::from(digit - b'0')))
    };
    let (year, at) = match (tag, digits.len()) {
        (UTC_TIME, 12) => {
            let short = number(0..2)?;
            (if short < 50 { 2000 + short } else { 1900 + short }, 2)
        }
        (GENERALIZED_TIME, 14) => (number(0..4)?, 4),
        _ => return None,
    };
    let part = |index: usize| number(at + 2 * index..at + 2 * index + 2);
    let (month, day, hour, minute, second) = (part(0)?, part(1)?, part(2)?, part(3)?, part(4)?);
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    Some(days(year, month, day) * 86_400 + hour * 3_600 + minute * 60 + second)
}

/// Days since 1970-01-01 in the Gregorian calendar. Years are counted from March, so that the leap
/// day is the last one.
fn days(year: i64, month: i64, day: i64) -> i64 {
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    365 * year + year.div_euclid(4) - year.div_euclid(100)
        + year.div_euclid(400)
        + (153 * month + 2) / 5
        + day
        - 719_469
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_calendar_that_agrees_with_known_days() {
        assert_eq!(days(1970, 1, 1), 0);
        assert_eq!(days(2000, 3, 1), 11_017);
        assert_eq!(days(2024, 2, 29), 19_782);
        assert_eq!(time((UTC_TIME, b"700101000000Z")), Some(0));
        assert_eq!(time((GENERALIZED_TIME, b"20240229120001Z")), Some(19_782 * 86_400 + 43_201));
        assert_eq!(time((UTC_TIME, b"20240229120001Z")), None);
        assert_eq!(time((UTC_TIME, b"701301000000Z")), None);
    }

    #[test]
    fn the_hash_follows_the_signature_algorithm() {
        let check = |algorithm: &'static rcgen::SignatureAlgorithm,
                     expected: Option<&'static digest::Algorithm>| {
            let key = rcgen::KeyPair::generate_for(algorithm).unwrap();
            let certificate = rcgen::CertificateParams::new(vec!["localhost".to_owned()])
                .unwrap()
                .self_signed(&key)
                .unwrap();
            let der: &[u8] = certificate.der();
            let expected = expected.map(|hash| digest::digest(hash, der).as_ref().to_vec());
            assert_eq!(end_point_hash(der), expected);
            let (from, to) = validity(der).unwrap();
            assert!(from < to, "{from} {to}");
        };
        check(&rcgen::PKCS_ECDSA_P256_SHA256, Some(&digest::SHA256));
        check(&rcgen::PKCS_ECDSA_P384_SHA384, Some(&digest::SHA384));
        check(&rcgen::PKCS_ED25519, None);
    }

    proptest! {
        #[test]
        fn garbage_never_panics(der in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = (end_point_hash(&der), validity(&der));
        }

        #[test]
        fn a_bent_certificate_never_panics(at in 0usize..200, value in any::<u8>(), cut in 0usize..500) {
            let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
            let certificate = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap().self_signed(&key).unwrap();
            let mut der = certificate.der().to_vec();
            let at = at % der.len();
            der[at] = value;
            der.truncate(cut.max(1));
            let _ = (end_point_hash(&der), validity(&der));
        }
    }
}
