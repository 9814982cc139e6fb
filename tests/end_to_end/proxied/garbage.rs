//! Frames that no honest client sends, at every state of the protocol: the connection ends with a
//! protocol error; the process and the other sessions go on.

use crate::fixture::*;

/// A state of the protocol to be rude in.
#[derive(Clone, Copy, Debug)]
enum State {
    Connected,
    Authenticating,
    Idle,
    InUnit,
    InTransaction,
    InCopy,
}

const STATES: [State; 6] = [
    State::Connected,
    State::Authenticating,
    State::Idle,
    State::InUnit,
    State::InTransaction,
    State::InCopy,
];

async fn reach(proxy: &Proxy, state: State) -> RawClient {
    let mut client = match state {
        State::Connected => return proxy.raw().await,
        State::Authenticating => {
            let mut client = proxy.raw().await;
            client.send(&startup(&[("user", "app"), ("database", "app")])).await;
            assert_eq!(client.read().await.unwrap().tag, b'R');
            return client;
        }
        _ => proxy.raw_login().await,
    };
    match state {
        State::InUnit => {
            client.send(&[parse("", "SELECT 1"), flush()].concat()).await;
            assert_eq!(client.read().await.unwrap().tag, b'1');
        }
        State::InTransaction => assert_eq!(tags(&client.ask(&query("BEGIN")).await), "CZ"),
        State::InCopy => {
            client.send(&query("COPY t FROM STDIN")).await;
            assert_eq!(client.read().await.unwrap().tag, b'G');
        }
        _ => {}
    }
    client
}

/// Frames whose framing itself is wrong: the other side cannot know where the next one starts.
fn broken_frames() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("length 0", b"Q\0\0\0\0".to_vec()),
        ("length 3", b"Q\0\0\0\x03".to_vec()),
        ("negative length", b"Q\xff\xff\xff\xff".to_vec()),
        ("length beyond the limit", b"Q\x7f\xff\xff\xff".to_vec()),
        ("an unknown type", message(b'\x07', b"x")),
        ("a server's message", message(b'T', b"\0\0")),
        ("HTTP", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
        ("zeros", vec![0; 64]),
        ("ones", vec![0xff; 64]),
    ]
}

/// The process lives and serves others.
async fn still_serves(proxy: &mut Proxy, why: &str) {
    assert!(proxy.is_running(), "the process has ended: {why}");
    let client = proxy.connect().await;
    client.simple_query("SELECT 1").await.unwrap_or_else(|error| panic!("{why}: {error}"));
}

async fn cluster_and_proxy() -> (Cluster, Proxy) {
    let cluster = Cluster::start(1).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let overrides = "auth: { login_timeout: 2s }";
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    (cluster, proxy)
}

#[tokio::test]
async fn a_broken_frame_ends_its_connection_in_every_state_and_no_other() {
    let (cluster, mut proxy) = cluster_and_proxy().await;
    let bystander = proxy.connect().await;
    for state in STATES {
        for (name, bytes) in broken_frames() {
            let mut client = reach(&proxy, state).await;
            let _ = client.try_send(&bytes).await;
            let rest = client.read_to_end().await;
            let errors: Vec<&Message> = rest.iter().filter(|message| message.tag == b'E').collect();
            let last = errors.last().map(|error| (error.field(b'V').unwrap(), error.field(b'C').unwrap()));
            let violation = last == Some(("FATAL".into(), "08P01".into()));
            match state {
                // Before a start-up packet is understood nobody knows whether the other side would
                // understand an error: PostgreSQL just closes, and so may the proxy.
                State::Connected | State::Authenticating => {
                    assert!(errors.is_empty() || violation, "{name} when {state:?}: {rest:?}");
                }
                _ => assert!(violation, "{name} when {state:?}: {rest:?}"),
            }
        }
        still_serves(&mut proxy, &format!("{state:?}")).await;
    }
    bystander.simple_query("SELECT 1").await.unwrap();
    let open = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%' OR query LIKE 'COPY%' AND state <> 'idle'";
    cluster.primary().wait_for(open, "0").await.unwrap();
}

#[tokio::test]
async fn a_frame_cut_off_at_any_byte_harms_nobody() {
    let (_cluster, mut proxy) = cluster_and_proxy().await;
    let unit =
        [parse("s", "SELECT $1::int"), bind("s", &["1"]), describe(b'P', ""), execute(), sync()].concat();
    for end in 0..unit.len() {
        let mut client = proxy.raw_login().await;
        client.send(&unit[..end]).await;
    }
    let start = startup(&[("user", "app"), ("database", "app")]);
    for end in 0..start.len() {
        let mut client = proxy.raw().await;
        client.send(&start[..end]).await;
    }
    still_serves(&mut proxy, "frames cut off").await;
}

#[tokio::test]
async fn well_framed_nonsense_is_answered_and_survived() {
    let (_cluster, mut proxy) = cluster_and_proxy().await;
    // Bodies that end early, miss their terminators or count wrong, in every message type.
    for tag in *b"QPBDECSHFXdcfp" {
        for body in [
            &b""[..],
            b"\0",
            b"x",
            b"\xff\xff\xff\xff",
            b"\0\0\0\0\xff\xff",
            b"\0\0\xff\xff\0\0\0\x01",
            b"a\0b\0\x7f\xff",
            b"S",
        ] {
            let mut client = proxy.raw_login().await;
            // The Sync ends what can be ended: an answer or the end of the connection, never silence.
            let _ = client.try_send(&[message(tag, body), sync()].concat()).await;
            client.read_ready().await;
        }
        still_serves(&mut proxy, &format!("nonsense in {:?}", char::from(tag))).await;
    }
}

#[tokio::test]
async fn bad_start_up_packets_are_refused() {
    let (_cluster, mut proxy) = cluster_and_proxy().await;
    let packets: [(&str, Vec<u8>); 7] = [
        ("no user", startup(&[("database", "app")])),
        ("protocol 2", [8_u32.to_be_bytes(), 131_072_u32.to_be_bytes()].concat()),
        ("a length of 4", 4_u32.to_be_bytes().to_vec()),
        ("a length of 100 MB", 100_000_000_u32.to_be_bytes().to_vec()),
        ("no terminator", [&12_u32.to_be_bytes()[..], &196_608_u32.to_be_bytes(), b"user"].concat()),
        ("a key alone", [&14_u32.to_be_bytes()[..], &196_608_u32.to_be_bytes(), b"user\0\0"].concat()),
        ("a cancel of wrong size", [&9_u32.to_be_bytes()[..], &80_877_102_u32.to_be_bytes(), b"x"].concat()),
    ];
    for (name, bytes) in packets {
        let mut client = proxy.raw().await;
        client.send(&bytes).await;
        // An error or nothing at all, but an end.
        let rest = client.read_to_end().await;
        assert!(rest.iter().all(|message| message.tag == b'E'), "{name}: {rest:?}");
    }
    still_serves(&mut proxy, "bad start-up packets").await;
}

#[tokio::test]
async fn whoever_does_not_log_in_is_shown_the_door() {
    let (_cluster, proxy) = cluster_and_proxy().await;
    for state in [State::Connected, State::Authenticating] {
        let mut client = reach(&proxy, state).await;
        // login_timeout is two seconds here; the fixture's patience is far longer.
        client.read_to_end().await;
    }
}

#[tokio::test]
async fn random_bytes_harm_nobody() {
    let (_cluster, mut proxy) = cluster_and_proxy().await;
    // The same every run: a failure can be repeated.
    let mut seed = 0x2545_F491_4F6C_DD1D_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for round in 0..120 {
        let state = STATES[round % STATES.len()];
        let mut client = reach(&proxy, state).await;
        let length = random() % 300 + 1;
        let bytes: Vec<u8> = (0..length).map(|_| random().to_be_bytes()[0]).collect();
        let _ = client.try_send(&bytes).await;
        // Not read: some of them leave the proxy waiting for the rest of a frame.
    }
    still_serves(&mut proxy, "random bytes").await;
}
